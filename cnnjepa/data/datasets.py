"""Load image sets by name, each as labelled train and test images."""

import gzip
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from cnnjepa.config import DataConfig, DatasetName, TrainConfig, other_set
from cnnjepa.data.imagenet import imagenet100_classes
from cnnjepa.data.packed import PackedImages, is_packed, read_manifest
from cnnjepa.data.pictures import Drawn, EncodedPicture, Picture
from cnnjepa.data.sources import files_of, tree_of
from cnnjepa.randomness import Stream, generator

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Indices = npt.NDArray[np.int64]


class Images(Protocol):
    """Labelled images of one split."""

    labels: npt.NDArray[np.int64]

    def __len__(self) -> int: ...

    def pictures(self, indices: list[int]) -> Sequence[Picture]:
        """Return the images at `indices`, not yet decoded."""
        ...


@dataclass
class GreyImages:
    """Small grey images in memory, [N, H, W] uint8, shown as RGB."""

    pixels: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def pictures(self, indices: list[int]) -> list[Drawn]:
        """Return the images at `indices`."""
        return [Drawn(np.repeat(self.pixels[index][:, :, None], 3, axis=2)) for index in indices]


class FolderImages:
    """Image files in one folder per class, read when they are needed."""

    def __init__(self, folder: Path, classes: list[str]) -> None:
        samples = files_of(folder, classes, "data.root").samples
        # An array of bytes, not a list of strings: worker processes share its pages.
        self.paths = np.array([path.encode() for path, _ in samples])
        self.labels = np.array([label for _, label in samples], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def place(self, index: int) -> str:
        """Return the path of the image at `index`."""
        return str(self.paths[index].decode())

    def encoded(self, index: int) -> bytes:
        """Read the bytes of the image file at `index`; raise OSError, which names it."""
        try:
            return Path(self.place(index)).read_bytes()
        except OSError as error:
            error.filename = error.filename or self.place(index)  # an error within the file names none
            raise

    def pictures(self, indices: list[int]) -> list[EncodedPicture]:
        """Read the images at `indices`."""
        return [EncodedPicture(self.encoded(index)) for index in indices]


@dataclass
class Dataset:
    """Train and test images, number of classes, and channel statistics for normalisation."""

    train: Images
    test: Images
    classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass
class Splits:
    """A dataset and the roles of its images.

    Pretraining sees `pretrain` without labels; as in the paper, these are all training images.
    Probes are fitted on `fit`. Choices are made on `holdout`, whose labels nothing is fitted on but
    the paper's probe, which decides nothing. `test` is read once, at the end.
    """

    dataset: Dataset
    pretrain: Indices
    fit: Indices
    holdout: Indices
    test: Indices


def _digits(config: DataConfig) -> Dataset:
    # Read scikit-learn's file without importing scikit-learn: that takes a second at every start.
    spec = find_spec("sklearn")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("data=digits must have scikit-learn installed, which ships the images; got none: pip install scikit-learn")
    with gzip.open(Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz", "rt") as file:
        table = np.loadtxt(file, delimiter=",")
    pixels = (table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
    labels = table[:, -1].astype(np.int64)
    order = generator(0, Stream.split, 0).permutation(len(labels))
    test, train = order[:360], order[360:]
    return Dataset(GreyImages(pixels[train], labels[train]), GreyImages(pixels[test], labels[test]), 10, (0.305,) * 3, (0.349,) * 3)


FASHION_FOLDERS = ("FashionMNIST/raw", "")
DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")


def _read_idx(folder: Path, name: str) -> npt.NDArray[np.uint8]:
    plain, packed = folder / name, folder / f"{name}.gz"
    if not plain.exists() and not packed.exists():
        raise ValueError(f"data.root must hold fashion_mnist's {name}(.gz) beside its other files; got {folder}")
    data = plain.read_bytes() if plain.exists() else gzip.decompress(packed.read_bytes())
    dimensions = data[3]
    shape = np.frombuffer(data, ">i4", dimensions, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def _fashion_mnist(config: DataConfig) -> Dataset:
    roots = [Path(config.root)] if config.root else [DEBIAN_FASHION]
    name = "train-images-idx3-ubyte"
    for folder in (root / part for root in roots for part in FASHION_FOLDERS):
        if (folder / name).exists() or (folder / f"{name}.gz").exists():
            break
    else:
        raise ValueError(
            f"data.root must hold fashion_mnist's {name}(.gz), directly or under FashionMNIST/raw; got {roots[0]}; to get it: "
            "apt-get install dataset-fashion-mnist (then leave data.root empty), or torchvision.datasets.FashionMNIST(root, download=True)"
        )
    splits = []
    for part in ("train", "t10k"):
        labels = _read_idx(folder, f"{part}-labels-idx1-ubyte").astype(np.int64)
        splits.append(GreyImages(_read_idx(folder, f"{part}-images-idx3-ubyte"), labels))
    return Dataset(splits[0], splits[1], 10, (0.286,) * 3, (0.353,) * 3)


def _folders(config: DataConfig, classes: list[str] | None, how: str) -> Dataset:
    """Return an image tree under `data.root`, or the set packed from one, in the same order."""
    name, root = config.name.name, Path(config.root) if config.root else Path("(data.root is empty)")
    if config.root and is_packed(root):
        return _packed(config, root, classes)
    train, test, classes = tree_of(root, "data.root", name, classes, how)
    for key, value in (("short_side", config.short_side), ("jpeg_quality", config.jpeg_quality)):
        if value:
            raise ValueError(f"data.{key} must be 0 for images that are not packed; got {value} with {root}")
    return Dataset(FolderImages(train, classes), FolderImages(test, classes), len(classes), IMAGENET_MEAN, IMAGENET_STD)


def _packed(config: DataConfig, root: Path, classes: list[str] | None) -> Dataset:
    manifest = read_manifest(root)
    for key, asked, packed in (
        ("short_side", config.short_side, manifest.short_side),
        ("jpeg_quality", config.jpeg_quality, manifest.jpeg_quality),
    ):
        if asked != packed:
            raise ValueError(f"data.{key} must be {packed}, as when {root} was packed, because it changes pixels; got {asked}")
    classes = manifest.classes if classes is None else classes
    if missing := sorted(set(classes) - set(manifest.classes)):
        raise ValueError(f"data.root must hold {config.name.name}'s {len(classes)} classes; got {root}; missing: {missing[0]}")
    try:
        train, val = (PackedImages(root, manifest, split, classes) for split in ("train", "val"))
    except ValueError as error:
        raise ValueError(f"data.root must hold a packed set that can be read; got {error}") from error
    return Dataset(train, val, len(classes), IMAGENET_MEAN, IMAGENET_STD)


def _imagefolder(config: DataConfig) -> Dataset:
    return _folders(config, None, "sort your images into one folder per class")


_IMAGENET_HOW = (
    "download ILSVRC2012 from image-net.org and pack it (python -m cnnjepa.data.pack), or unpack it into one folder per WordNet ID"
)


def _imagenet1k(config: DataConfig) -> Dataset:
    dataset = _folders(config, None, _IMAGENET_HOW)
    if dataset.classes != 1000:
        raise ValueError(f"data.root must hold imagenet1k's 1000 classes; got {dataset.classes} in {config.root}")
    return dataset


def _imagenet100(config: DataConfig) -> Dataset:
    return _folders(config, imagenet100_classes(), _IMAGENET_HOW + "; the 100 classes are selected from it")


_READERS: dict[DatasetName, Callable[[DataConfig], Dataset]] = {
    DatasetName.digits: _digits,
    DatasetName.fashion_mnist: _fashion_mnist,
    DatasetName.imagefolder: _imagefolder,
    DatasetName.imagenet100: _imagenet100,
    DatasetName.imagenet1k: _imagenet1k,
}


def load_splits(config: DataConfig) -> Splits:
    """Return the images of `config` and their roles, which do not depend on the run's seed.

    Raise ValueError if the set is missing, or if a part would be empty or lack classes.
    """
    dataset = _READERS[config.name](config)
    train = generator(0, Stream.split, 1).permutation(len(dataset.train))
    test = generator(0, Stream.split, 2).permutation(len(dataset.test))
    train = train[: config.train_limit or None]
    test = np.sort(test[: config.test_limit or None])
    held = round(len(train) * config.holdout_fraction)
    fit, holdout = np.sort(train[held:]), np.sort(train[:held])
    return require_roles(Splits(dataset, np.sort(train), fit, holdout, test), config)


def require_roles(splits: Splits, config: DataConfig) -> Splits:
    """Return the splits; raise ValueError if a part is empty or lacks classes."""
    for name, part in (("train", splits.fit), ("held-out", splits.holdout), ("test", splits.test)):
        if not len(part):
            raise ValueError(f"data.{config.name.name} must have {name} images after the limits and holdout_fraction; got none")
    if len(splits.holdout) < 2:
        rule = f"hold out at least 2 of the {len(splits.pretrain)} images"
        raise ValueError(f"data.holdout_fraction must {rule}; got {config.holdout_fraction}")
    present = len(np.unique(splits.dataset.train.labels[splits.fit]))
    if present < 2:
        raise ValueError(f"data.{config.name.name} must have at least 2 classes in its training images for the probes; got {present}")
    return splits


def probed_sets(config: TrainConfig, own: Splits) -> Iterator[tuple[str, Splits]]:
    """Yield the key and the images of each set that a run's probes read: its own, then `probes.data`."""
    yield "data.root", own
    for entry in config.probes.data:
        yield f"probes.data {entry}", load_other(entry, config.data)


def load_other(entry: str, data: DataConfig) -> Splits:
    """Return the images of an entry of `probes.data`; raise ValueError, naming it, if they are missing."""
    try:
        return load_splits(other_set(entry, data))
    except ValueError as error:
        raise ValueError(f"probes.data must name a set that is there; got {entry}: {error}") from error
