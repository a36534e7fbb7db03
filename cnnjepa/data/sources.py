"""List the images of a tree, ImageNet's tar files or a torchvision set.

The order is that of an image folder, so that a packed set numbers its images alike.
"""

import contextlib
import errno
import inspect
import io
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

SPLITS = ("train", "val")
TORCHVISION = "torchvision:"
_TRAIN_TAR, _VAL_TAR, _DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"


class Entry(NamedTuple):
    """Location of the bytes of one image of a source."""

    name: str  # <class>/<file>, or the path within a tree without classes
    label: int  # -1 in a torchvision set: found when the image is read
    path: str
    offset: int  # in bytes; in a torchvision set the image's index
    size: int  # bytes; 0 if unknown before reading


@dataclass
class Source:
    """All images of a data set, by split."""

    classes: list[str]
    splits: dict[str, list[Entry]]
    left_out: Counter[str] = field(default_factory=Counter)  # reason -> files of a tree that are no images

    def bytes(self) -> int:
        """Return the bytes of all images, as far as they are known."""
        return sum(e.size for entries in self.splits.values() for e in entries)


def read(entry: Entry) -> tuple[bytes, int]:
    """Return the encoded image and its label; raise OSError if the file has become shorter."""
    if entry.path.startswith(TORCHVISION):
        return _from_torchvision(entry)
    with open(entry.path, "rb", buffering=0) as file:
        data = os.pread(file.fileno(), entry.size, entry.offset)
    if len(data) != entry.size:
        raise OSError(f"{entry.path} ends in the middle of the image")
    return data, entry.label


def find(source: str, root: str, classes: list[str] | None, labelled: bool = True) -> Source:
    """Return the images of `source`, of `classes` only if given; raise ValueError without any.

    Unless `labelled`, they are those of a tree without classes, all training images.
    """
    if not labelled:
        folder, found = unlabelled(Path(source), "SOURCE")
        return Source(["images"], {"train": _entries(folder, found)}, found.left_out)
    if source.startswith(TORCHVISION):
        if classes is not None:
            raise ValueError(f"--classes must be left out with a torchvision set; got {source}")
        return _torchvision(source, root)
    folder = Path(source)
    tars = any((folder / name).exists() for name in (_TRAIN_TAR, _VAL_TAR))
    images = _imagenet_tars(folder, classes) if tars else _tree(folder, classes)
    for split, entries in images.splits.items():
        if not entries:
            raise ValueError(f"SOURCE must hold images of the split {split}; got none in {source}")
    return images


_VAL_NAMES = ("val", "test", "valid", "validation")
_HELPERS = ("__MACOSX", "@eaDir")  # of macOS and of Synology's servers


def is_helper(name: str) -> bool:
    """Return whether a file or folder of that name is hidden, or was written by another program."""
    return name.startswith(".") or name in _HELPERS


def classes_in(folder: Path) -> list[str]:
    """Return the sorted names of the class folders in `folder`."""
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not is_helper(p.name))


def val_folder(root: Path) -> Path | None:
    """Return the folder of a tree's test images, or None without one."""
    return next((root / name for name in _VAL_NAMES if (root / name).is_dir()), None)


def train_only(root: Path, key: str) -> tuple[Path, list[str]]:
    """Return the folder that holds the class folders of a tree without test images, and the sorted classes."""
    folder = root / "train" if (root / "train").is_dir() else root
    if not folder.is_dir() or not (classes := classes_in(folder)):
        raise ValueError(f"{key} must hold one folder per class, in train/ or itself; got {root}; images without labels: data=images")
    return folder, classes


def tree_of(root: Path, key: str, what: str, classes: list[str] | None, how: str) -> tuple[Path, Path, list[str]]:
    """Return train folder, val folder and sorted classes; raise ValueError if one is missing."""
    train, val = root / "train", val_folder(root)
    if not train.is_dir() or val is None:
        others = ", ".join(_VAL_NAMES[1:])
        raise ValueError(
            f"{key} must hold {what} as train/<class>/<image> and val/<class>/<image> (or {others}); got {root}; to get it: {how}"
        )
    if classes is None:
        classes = classes_in(train)
        if unknown := sorted(set(classes_in(val)) - set(classes)):
            raise ValueError(f"{key} must hold the same classes in train and {val.name}; got {', '.join(unknown[:5])} only in {val}")
    missing = [str(f) for f in (split / c for split in (train, val) for c in classes) if not f.is_dir()]
    if missing or not classes:
        first = missing[0] if missing else f"no class folder in {train}"
        raise ValueError(f"{key} must hold one folder per class, {len(classes)} of them; got {root}; missing: {first}")
    return train, val, classes


@dataclass
class Listing:
    """The images below a folder, and counts of what was left out."""

    samples: list[tuple[str, int]]  # path and label
    left_out: Counter[str]  # reason -> files, and folders that are left out as a whole


def files_of(folder: Path, classes: list[str], key: str) -> Listing:
    """Return the images below `folder`, in order of torchvision's ImageFolder.

    Raise ValueError for a class without an image, a link that leads nowhere, and a name that is not
    UTF-8. Hidden files, and helper folders of other programs, are left out.
    """
    found = Listing([], Counter())
    with os.scandir(folder) as entries:
        for entry in entries:
            if not is_helper(entry.name) and not entry.is_dir():
                _require_target(entry, key)
                found.left_out["beside the class folders"] += 1
    for label, name in enumerate(classes):
        paths = _images_below(folder / name, key, found.left_out)
        if not paths:
            raise ValueError(f"{key} must hold at least one image per class; got none in {folder / name}")
        found.samples += [(path, label) for path in paths]
    return found


def unlabelled(root: Path, key: str) -> tuple[Path, Listing]:
    """Return the images below `root`/train, or below `root` without one, all with the label 0.

    Return the folder that was searched, too. Raise ValueError as `files_of` does.
    """
    if not root.is_dir():
        raise ValueError(f"{key} must be a folder of images; got {root}")
    folder, found = root / "train" if (root / "train").is_dir() else root, Listing([], Counter())
    found.samples = [(path, 0) for path in _images_below(folder, key, found.left_out)]
    if not found.samples:
        raise ValueError(f"{key} must hold images, in folders of any depth; got none below {folder}")
    if folder != root and (beside := sum(entry.name != folder.name and not is_helper(entry.name) for entry in os.scandir(root))):
        found.left_out[f"beside {folder.name}/"] = beside
    return folder, found


def _require_target(entry: "os.DirEntry[str]", key: str) -> None:
    if entry.is_symlink() and not os.path.exists(entry.path):
        raise ValueError(f"{key} must hold no link that leads nowhere; got {entry.path} -> {os.readlink(entry.path)}: correct or remove it")


def _images_below(top: Path, key: str, left_out: Counter[str]) -> list[str]:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    by_folder: list[tuple[str, list[str]]] = []
    folders = [str(top)]
    while folders:
        here, names = folders.pop(), []
        with _listed(here, key) as entries:
            for entry in entries:
                try:
                    entry.path.encode()
                except UnicodeEncodeError as error:
                    raise ValueError(f"{key} must hold names in UTF-8; got {os.fsencode(entry.path)!r}: rename it") from error
                suffix = os.path.splitext(entry.name)[1].lower()
                if is_helper(entry.name):
                    left_out["hidden or a helper of another program"] += 1
                elif entry.is_dir():
                    folders.append(entry.path)
                elif suffix not in IMG_EXTENSIONS:
                    left_out[suffix or "no extension"] += 1
                else:
                    _require_target(entry, key)
                    names.append(entry.name)
        by_folder.append((here, sorted(names)))
    return [os.path.join(here, name) for here, names in sorted(by_folder) for name in names]


@contextlib.contextmanager
def _listed(folder: str, key: str) -> Iterator["Iterator[os.DirEntry[str]]"]:
    """List a folder; raise ValueError if that is forbidden, or leads through a link into itself."""
    try:
        with os.scandir(folder) as entries:
            yield entries
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.ELOOP):
            raise
        rule = f"{key} must hold folders that can be read, and no link into itself"
        raise ValueError(f"{rule}; got {error.filename}: {error.strerror}: correct or remove it") from error


def said_of(left_out: Counter[str]) -> str:
    """Return 'left out: 3 .txt, 1 .db', or "" if nothing was left out."""
    counts = ", ".join(f"{count} {reason}" for reason, count in left_out.most_common())
    return f"left out: {counts}" if counts else ""


def _tree(root: Path, classes: list[str] | None) -> Source:
    how = f"or give a folder that holds {_TRAIN_TAR}, or torchvision:NAME with --root"
    train, val, classes = tree_of(root, "SOURCE", "images", classes, how)
    splits, left_out = {}, Counter[str]()
    for split, folder in zip(SPLITS, (train, val), strict=True):
        found = files_of(folder, classes, "SOURCE")
        left_out += found.left_out
        splits[split] = _entries(folder, found)
    return Source(classes, splits, left_out)


def _entries(folder: Path, found: Listing) -> list[Entry]:
    return [Entry(os.path.relpath(path, folder), label, path, 0, os.stat(path).st_size) for path, label in found.samples]


def _imagenet_tars(folder: Path, classes: list[str] | None) -> Source:
    for name in (_TRAIN_TAR, _VAL_TAR, _DEVKIT):
        if not (folder / name).is_file():
            raise ValueError(f"SOURCE must hold {_TRAIN_TAR}, {_VAL_TAR} and {_DEVKIT}; got {folder} without {name}")
    try:
        wordnet, truth = _devkit(folder / _DEVKIT)
        train: list[tuple[str, str, int, int]] = []
        path = folder / _TRAIN_TAR
        with tarfile.open(path) as outer:
            for member in outer:
                wnid = Path(member.name).stem
                if classes is None or wnid in classes:
                    with tarfile.open(fileobj=outer.extractfile(member), mode="r:") as inner:
                        train += [(wnid, m.name, member.offset_data + m.offset_data, m.size) for m in inner if m.isfile()]
        with tarfile.open(folder / _VAL_TAR) as flat:
            members = sorted((Path(m.name).name, m.offset_data, m.size) for m in flat if m.isfile())
    except (tarfile.TarError, KeyError, EOFError, OSError) as error:
        raise ValueError(f"SOURCE must hold ImageNet's complete tar files, as downloaded; got {folder}: {error!r}") from error
    if len(members) != len(truth):
        raise ValueError(f"{_VAL_TAR} must hold the {len(truth)} images whose classes {_DEVKIT} lists; got {len(members)}")
    val = [(wordnet[number], name, offset, size) for (name, offset, size), number in zip(members, truth, strict=True)]
    names = sorted({t[0] for t in train}) if classes is None else classes
    if missing := sorted(set(names) - {t[0] for t in train}):
        raise ValueError(f"{_TRAIN_TAR} must hold a tar file of each class; got none of {missing[0]}")
    labels = {name: i for i, name in enumerate(names)}
    splits = {
        split: [
            Entry(f"{wnid}/{name}", labels[wnid], str(tar), offset, size) for wnid, name, offset, size in sorted(found) if wnid in labels
        ]
        for split, tar, found in (("train", path, train), ("val", folder / _VAL_TAR, val))
    }
    return Source(names, splits)


def _devkit(path: Path) -> tuple[dict[int, str], list[int]]:
    """Return WordNet ID by class number, and the class numbers of validation images by name."""
    from scipy.io import loadmat

    with tarfile.open(path) as archive:

        def content(name: str) -> bytes:
            member = archive.extractfile(f"{path.name.split('.')[0]}/data/{name}")
            assert member is not None
            return member.read()

        synsets = loadmat(io.BytesIO(content("meta.mat")), squeeze_me=True)["synsets"]
        truth = [int(line) for line in content("ILSVRC2012_validation_ground_truth.txt").split()]
    return {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets if int(s["num_children"]) == 0}, truth


_opened: dict[tuple[str, str], Any] = {}


def _torchvision_set(name: str, root: str, split: str) -> Any:
    """Return torchvision's data set of that name, opened once per process."""
    import torchvision

    key = (f"{name} {root}", split)
    if key not in _opened:
        build: Any = getattr(torchvision.datasets, name, None)
        if not isinstance(build, type):
            raise ValueError(f"SOURCE must name a class of torchvision.datasets; got {TORCHVISION}{name}")
        make: Callable[..., Any] = build
        parameters = inspect.signature(build).parameters
        if "train" in parameters:
            options: list[dict[str, Any]] = [{"train": split == "train"}]
        elif "split" in parameters:
            options = [{"split": s} for s in (("train",) if split == "train" else ("test", "val"))]
        else:
            raise ValueError(f"SOURCE must name a torchvision set with the parameter train or split; got {TORCHVISION}{name}")
        for option in options:
            try:
                _opened[key] = make(root, **option)
                break
            except ValueError:  # no split of that name
                continue
            except (RuntimeError, OSError, TypeError) as error:
                raise ValueError(f"--root must hold {name} in torchvision's layout; got {root}: {' '.join(str(error).split())}") from error
        else:
            raise ValueError(f"SOURCE must have a split for {split}; got {TORCHVISION}{name}")
    return _opened[key]


def _torchvision(source: str, root: str) -> Source:
    name, splits, classes = source.removeprefix(TORCHVISION), {}, []
    for split in SPLITS:
        images = _torchvision_set(name, root, split)
        classes = [str(c) for c in getattr(images, "classes", [])]
        if not classes:
            raise ValueError(f"SOURCE must name a torchvision set with classes; got {source}")
        path = f"{TORCHVISION}{name}:{split}:{root}"
        splits[split] = [Entry(f"{i:07}.png", -1, path, i, 0) for i in range(len(images))]
    return Source(classes, splits)


def _from_torchvision(entry: Entry) -> tuple[bytes, int]:
    """Return the image as PNG, which is lossless, and its label."""
    name, split, root = entry.path.removeprefix(TORCHVISION).split(":", 2)
    image, label = _torchvision_set(name, root, split)[entry.offset]
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    return encoded.getvalue(), int(label)
