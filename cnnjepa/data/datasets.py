"""Load image sets by name, each as labelled train and test images."""

import gzip
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from cnnjepa.config import TrainConfig
from cnnjepa.data.imagenet import classes_of
from cnnjepa.data.packed import PackedImages, is_packed, read_manifest
from cnnjepa.data.pictures import Drawn, EncodedPicture, Picture
from cnnjepa.data.sources import Listing, files_of, said_of, train_only, tree_of, unlabelled, val_folder
from cnnjepa.data_config import OWN_SETS, DataConfig, DatasetName, other_set
from cnnjepa.randomness import Stream, generator

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Indices = npt.NDArray[np.int64]
IMAGENETS = (DatasetName.imagenet100, DatasetName.imagenet100_kaggle, DatasetName.imagenet1k)
# Images of each published set: train, test; None: not known for certain, so not compared.
EXPECTED_IMAGES: dict[DatasetName, tuple[int | None, int]] = {
    DatasetName.digits: (1437, 360),
    DatasetName.fashion_mnist: (60_000, 10_000),
    DatasetName.imagenet100: (126_689, 5_000),
    DatasetName.imagenet100_kaggle: (None, 5_000),
    DatasetName.imagenet1k: (1_281_167, 50_000),
}


class Images(Protocol):
    """Labelled images of one split."""

    labels: npt.NDArray[np.int64]

    def __len__(self) -> int: ...

    def pictures(self, indices: list[int]) -> Sequence[Picture]:
        """Return the images at `indices`, not yet decoded."""
        ...


@dataclass
class GreyImages:
    """Small grey images in memory, [N, H, W] uint8, shown in 1 or 3 equal channels."""

    pixels: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    channels: int = 3

    def __len__(self) -> int:
        return len(self.labels)

    def pictures(self, indices: list[int]) -> list[Drawn]:
        """Return the images at `indices`."""
        return [Drawn(np.repeat(self.pixels[index][:, :, None], self.channels, axis=2)) for index in indices]


class FolderImages:
    """Image files below one folder, read when they are needed."""

    def __init__(self, folder: Path, found: Listing, channels: int = 3) -> None:
        self.channels = channels
        # An array of bytes, not a list of strings: worker processes share its pages.
        self.paths = np.array([path.encode() for path, _ in found.samples])
        self.labels = np.array([label for _, label in found.samples], dtype=np.int64)
        self.folder, self.left_out = folder, said_of(found.left_out)

    @staticmethod
    def of(folder: Path, classes: list[str], channels: int = 3) -> "FolderImages":
        """Return the images in the class folders of `folder`."""
        return FolderImages(folder, files_of(folder, classes, "data.root"), channels)

    def __len__(self) -> int:
        return len(self.labels)

    def names(self) -> list[str]:
        """Return the path of each image relative to the folder."""
        prefix = os.path.join(os.fsencode(self.folder), b"")
        return [path.removeprefix(prefix).decode() for path in self.paths.tolist()]

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
        return [EncodedPicture(self.encoded(index), channels=self.channels) for index in indices]


@dataclass
class Dataset:
    """Train and test images, number of classes, and channel statistics for normalisation."""

    train: Images
    test: Images
    classes: int
    mean: tuple[float, ...]  # one per channel
    std: tuple[float, ...]

    @property
    def parts(self) -> dict[str, Images]:
        """Return the images by split; one split where the test images are some of the training images."""
        return {"train": self.train} if self.test is self.train else {"train": self.train, "val": self.test}

    @property
    def counted(self) -> str:
        """Return '1200 training and 300 test images'."""
        names = {"train": "training", "val": "test"}
        return f"{' and '.join(f'{len(images)} {names[split]}' for split, images in self.parts.items())} images"


@dataclass
class Splits:
    """A dataset and the roles of its images.

    Pretraining sees `pretrain` without labels; as in the paper, these are all training images.
    Probes are fitted on `fit`. Choices are made on `holdout`, whose labels nothing is fitted on but
    the paper's probe, which decides nothing. `test` is read once, at the end. Of a set without
    labels, `fit` and `test` are empty.
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
    splits = [GreyImages(pixels[part], labels[part], config.channels) for part in (train, test)]
    return Dataset(splits[0], splits[1], 10, (0.305,) * config.channels, (0.349,) * config.channels)


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
        splits.append(GreyImages(_read_idx(folder, f"{part}-images-idx3-ubyte"), labels, config.channels))
    return Dataset(splits[0], splits[1], 10, (0.286,) * config.channels, (0.353,) * config.channels)


def _folders(config: DataConfig, classes: list[str] | None, how: str) -> Dataset:
    """Return an image tree under `data.root`, or the set packed from one, in the same order."""
    name, root = config.name.name, Path(config.root) if config.root else Path("(data.root is empty)")
    if config.root and is_packed(root):
        return _packed(config, root, classes)
    train, test, classes = tree_of(root, "data.root", name, classes, how)
    _require_unshrunk(config, root)
    images = [FolderImages.of(part, classes, config.channels) for part in (train, test)]
    return Dataset(images[0], images[1], len(classes), IMAGENET_MEAN, IMAGENET_STD)


def _require_unshrunk(config: DataConfig, root: Path) -> None:
    for key, value in (("short_side", config.short_side), ("jpeg_quality", config.jpeg_quality)):
        if value:
            raise ValueError(f"data.{key} must be 0 for images that are not packed; got {value} with {root}")


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
    without = config.name is DatasetName.images
    if not without and not any(file.split == "val" for file in manifest.files):
        raise ValueError(f"data.root must hold classes and test images; got {root}, packed with --unlabelled: use data=images")
    try:
        train = PackedImages(root, manifest, "train", classes, config.channels)
        val = train if without else PackedImages(root, manifest, "val", classes, config.channels)
    except ValueError as error:
        raise ValueError(f"data.root must hold a packed set that can be read; got {error}") from error
    if without:
        train.labels = np.zeros_like(train.labels)
    return Dataset(train, val, 1 if without else len(classes), IMAGENET_MEAN, IMAGENET_STD)


def _imagefolder(config: DataConfig) -> Dataset:
    root = Path(config.root)
    if config.val_fraction and config.root:
        if is_packed(root):
            raise ValueError(f"data.val_fraction must be 0 for a packed set; got {config.val_fraction} with {root}")
        if (val := val_folder(root)) is not None:
            raise ValueError(f"data.val_fraction must be 0 for a set with test images; got {config.val_fraction} with {val}")
        _require_unshrunk(config, root)
        train, classes = train_only(root, "data.root")
        images = FolderImages.of(train, classes, config.channels)
        return Dataset(images, images, len(classes), IMAGENET_MEAN, IMAGENET_STD)
    how = "sort your images into one folder per class; data.val_fraction=0.1 takes the test images from the others"
    return _folders(config, None, f"{how}, and data=images needs no labels")


def _images(config: DataConfig) -> Dataset:
    root = Path(config.root) if config.root else Path("(data.root is empty)")
    if config.root and is_packed(root):
        return _packed(config, root, None)
    _require_unshrunk(config, root)
    images = FolderImages(*unlabelled(root, "data.root"), config.channels)
    return Dataset(images, images, 1, IMAGENET_MEAN, IMAGENET_STD)


_IMAGENET_HOW = (
    "download ILSVRC2012 from image-net.org and pack it (python -m cnnjepa.data.pack), or unpack it into one folder per WordNet ID"
)


def _imagenet1k(config: DataConfig) -> Dataset:
    dataset = _folders(config, None, _IMAGENET_HOW)
    if dataset.classes != 1000:
        raise ValueError(f"data.root must hold imagenet1k's 1000 classes; got {dataset.classes} in {config.root}")
    return dataset


def _imagenet100(config: DataConfig) -> Dataset:
    return _folders(config, classes_of(config.name.name), _IMAGENET_HOW + "; the 100 classes are selected from it")


_READERS: dict[DatasetName, Callable[[DataConfig], Dataset]] = {
    DatasetName.digits: _digits,
    DatasetName.fashion_mnist: _fashion_mnist,
    DatasetName.imagefolder: _imagefolder,
    DatasetName.images: _images,
    DatasetName.imagenet100: _imagenet100,
    DatasetName.imagenet100_kaggle: _imagenet100,
    DatasetName.imagenet1k: _imagenet1k,
}


def load_dataset(config: DataConfig) -> Dataset:
    """Return the images of `config`; raise ValueError if the set is missing or incomplete."""
    dataset = _READERS[config.name](config)
    return replace(dataset, mean=tuple(config.mean or dataset.mean), std=tuple(config.std or dataset.std))


def load_splits(config: DataConfig) -> Splits:
    """Return the images of `config` and their roles, which do not depend on the run's seed.

    Raise ValueError if the set is missing, or if a part would be empty or lack classes.
    """
    return divide(load_dataset(config), config)


def divide(dataset: Dataset, config: DataConfig) -> Splits:
    """Return the roles of a data set's images.

    Of a user's own images, the same share of each class is held out. A run of version 0.1, without
    a fingerprint, keeps its draw from all images.
    """
    order, labels = generator(0, Stream.split, 1).permutation(len(dataset.train)), dataset.train.labels
    test = np.arange(0) if dataset.test is dataset.train else generator(0, Stream.split, 2).permutation(len(dataset.test))
    if config.val_fraction:
        test, order = held_out(order, labels, config.val_fraction)
    train, test = order[: config.train_limit or None], np.sort(test[: config.test_limit or None])
    by_class = config.name in OWN_SETS and bool(config.fingerprint)
    held, rest = held_out(train, labels if by_class else np.zeros_like(labels), config.holdout_fraction)
    fit = rest[:0] if config.name is DatasetName.images else np.sort(rest)
    return require_roles(Splits(dataset, np.sort(train), fit, np.sort(held), test), config)


def require_roles(splits: Splits, config: DataConfig) -> Splits:
    """Return the splits; raise ValueError if a part is empty or lacks classes."""
    labelled = {} if config.name is DatasetName.images else {"train": splits.fit, "test": splits.test}
    for name, part in {**labelled, "held-out": splits.holdout}.items():
        if not len(part):
            raise ValueError(f"data.{config.name.name} must have {name} images after the limits and holdout_fraction; got none")
    if len(splits.holdout) < 2:
        rule = f"hold out at least 2 of the {len(splits.pretrain)} images"
        raise ValueError(f"data.holdout_fraction must {rule}; got {config.holdout_fraction}")
    if labelled and (present := len(np.unique(splits.dataset.train.labels[splits.fit]))) < 2:
        rule = f"data.{config.name.name} must have at least 2 classes in its training images for the probes"
        raise ValueError(f"{rule}; got {present}: data=images pretrains on images without labels")
    return splits


def held_out(order: Indices, labels: Indices, fraction: float) -> tuple[Indices, Indices]:
    """Divide `order`, shuffled indices into `labels`; return the held-out indices and the others.

    Of n indices, round(n * fraction) are held out, of each class in the same share. The last index
    of a class is never held out. Within a class, the first in `order` are.
    """
    mine = labels[order]
    counts = np.bincount(mine)
    wanted = counts * fraction
    most = np.maximum(counts - 1, 0)
    held = np.minimum(np.floor(wanted).astype(int), most)
    by_remainder = np.argsort(held - wanted, kind="stable")  # the largest get what rounding left over
    held[by_remainder[(held < most)[by_remainder]][: max(round(len(order) * fraction) - held.sum(), 0)]] += 1
    grouped = np.argsort(mine, kind="stable")
    place = np.empty(len(order), np.int64)  # among its class
    place[grouped] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    is_held = place < held[mine]
    return order[is_held], order[~is_held]


def about(splits: Splits, config: DataConfig) -> list[str]:
    """Return lines about a user's own images that the user should know before a run."""
    data, labels = splits.dataset, splits.dataset.train.labels
    loose = [images for images in data.parts.values() if isinstance(images, FolderImages)]
    lines = [f"{images.folder}: {images.left_out}" for images in loose if images.left_out]
    if config.val_fraction:
        lines.append(f"data.val_fraction: {len(splits.test)} of the {len(labels)} images are the test images, drawn by class")
    if config.name is not DatasetName.images and (unseen := sorted(set(labels.tolist()) - set(labels[splits.fit].tolist()))):
        first = int(np.argmax(labels == unseen[0]))
        which = data.train.place(first) if isinstance(data.train, FolderImages) else f"image {first}"
        lines.append(f"no training image is left for the probes of {len(unseen)} classes, such as that of {which}")
    return lines


def require_whole(config: DataConfig, dataset: Dataset) -> None:
    """Raise ValueError if a published set has not all of its images, as far as their number is known."""
    found = {"training": len(dataset.train), "test": len(dataset.test)}
    known = zip(found, EXPECTED_IMAGES.get(config.name, (None, None)), strict=True)
    if wrong := [f"{count} {part}" for part, count in known if count not in (None, found[part])]:
        rule = f"data.{config.name.name} must have {' and '.join(wrong)} images"
        raise ValueError(f"{rule}; got {dataset.counted} in {config.root or 'the default folder'}: complete the set")


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
