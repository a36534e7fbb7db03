"""ImageNet-100: the 100 classes of Tian et al., Contrastive Multiview Coding."""

from importlib import resources


def imagenet100_classes() -> list[str]:
    """Return the WordNet IDs of ImageNet-100, sorted."""
    return sorted(resources.files("cnnjepa.data").joinpath("imagenet100.txt").read_text().split())
