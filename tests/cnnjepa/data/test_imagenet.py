"""Two sets are called ImageNet-100. Each has its name, and a name is one set wherever it is given."""

import re
from pathlib import Path

import pytest

from cnnjepa.data.datasets import load_splits
from cnnjepa.data.imagenet import CLASS_LISTS, classes_of
from cnnjepa.data.packed import read_manifest
from cnnjepa.data_config import DATA_PRESETS, DataConfig, DatasetName, other_set
from cnnjepa.run.identity import signature
from jobs.config import compose_job
from sweeps import ema_momentum, joint_search, learning_rate, mask_ratio, method_comparison, predictor_ablation
from tests.support.images import image_tree
from tests.support.packing import run
from tests.support.tiny import tiny_config

CMC, KAGGLE = (frozenset(classes_of(name)) for name in ("imagenet100", "imagenet100_kaggle"))


def test_each_list_has_100_classes_and_8_are_in_both() -> None:
    for name in CLASS_LISTS:
        classes = classes_of(name)
        assert len(classes) == len(set(classes)) == 100
        assert classes == sorted(classes)
        assert all(re.fullmatch(r"n\d{8}", wnid) for wnid in classes)
    assert len(CMC & KAGGLE) == 8
    assert "n01440764" in KAGGLE - CMC  # tench, the first class of ImageNet
    assert "n01558993" in CMC - KAGGLE  # robin


@pytest.mark.parametrize("name", sorted(CLASS_LISTS))
def test_a_set_is_selected_by_its_name_alone(name: str, tmp_path: Path) -> None:
    """From one tree that holds both, in training, in probes.data and packed."""
    tree = image_tree(tmp_path / "tree", sorted(CMC | KAGGLE), images=1)
    data = DataConfig(DatasetName[name], root=str(tree))
    images = load_splits(data).dataset.train
    assert {Path(path.decode()).parent.name for path in images.paths} == set(classes_of(name))  # type: ignore[attr-defined]
    probed = other_set(f"{name}:{tree}", tiny_config().data)
    assert list(load_splits(probed).dataset.train.paths) == list(images.paths)  # type: ignore[attr-defined]
    assert run(tree, tmp_path / "packed", "--classes", name).returncode == 0
    assert read_manifest(tmp_path / "packed").classes == classes_of(name)
    other = next(n for n in CLASS_LISTS if n != name)
    with pytest.raises(ValueError, match=rf"data.root must hold {other}'s 100 classes"):
        load_splits(DataConfig(DatasetName[other], root=str(tmp_path / "packed")))


def test_they_are_two_experiments_of_the_same_preset() -> None:
    ours, theirs = (compose_job([f"data={name}"]).train for name in ("imagenet100", "imagenet100_kaggle"))
    assert signature(ours) != signature(theirs)
    assert {**vars(ours.data), "name": ""} == {**vars(theirs.data), "name": ""} == {**vars(DATA_PRESETS["imagenet100"]), "name": ""}
    assert compose_job(["data=imagenet100_kaggle", "method=supervised"]).train.method.classes == 0  # its 100 are known


def test_runs_on_the_first_one_keep_their_names() -> None:
    assert signature(compose_job(["data=imagenet100", "encoder.name=resnet50"]).train) == "94d4f4d614606ace"


@pytest.mark.parametrize(
    "module", [ema_momentum, joint_search, learning_rate, mask_ratio, method_comparison, predictor_ablation], ids=lambda m: m.__name__
)
def test_what_reproduces_the_paper_takes_the_set_that_its_authors_link(module: object) -> None:
    sweep = module.SWEEP  # type: ignore[attr-defined]
    assert sweep.job("komondor", [*sweep.paper.overrides, "account=abc"]).train.data.name is DatasetName.imagenet100_kaggle
