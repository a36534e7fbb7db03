"""Classes of the two sets that are called ImageNet-100; docs/get-started/single-run.md says where each comes from."""

from importlib import resources

# Name of the set -> the file with its WordNet IDs.
CLASS_LISTS = {
    "imagenet100": "imagenet100.txt",  # Tian et al., Contrastive Multiview Coding
    "imagenet100_kaggle": "imagenet100_kaggle.txt",  # kaggle.com/datasets/ambityga/imagenet100, linked by the CNN-JEPA authors
}


def classes_of(name: str) -> list[str]:
    """Return the WordNet IDs of a set of `CLASS_LISTS`, sorted."""
    return sorted(resources.files("cnnjepa.data").joinpath(CLASS_LISTS[name]).read_text().split())
