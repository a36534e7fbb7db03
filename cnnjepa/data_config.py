"""The image set of a run: which images, their splits, and how views are drawn from them.

`NEUTRAL` and `ADDED` mark fields of all configuration classes: see cnnjepa/config.py.
"""

from dataclasses import dataclass, field, replace
from enum import Enum

NEUTRAL = {"neutral": True}


# Added after the first runs: not part of the run ID at its default, so older run IDs stay valid.
ADDED = {"added": True}


class DatasetName(Enum):
    """Data sets that cnnjepa/data/datasets.py can read."""

    digits = "digits"
    fashion_mnist = "fashion_mnist"
    imagefolder = "imagefolder"
    images = "images"  # without labels
    imagenet100 = "imagenet100"
    imagenet100_kaggle = "imagenet100_kaggle"
    imagenet1k = "imagenet1k"


# Sets that a user brings: `DataConfig.fingerprint` tells one from another.
OWN_SETS = (DatasetName.imagefolder, DatasetName.images)


class Verify(Enum):
    """What tells two sets of a user's images apart; see cnnjepa/data/fingerprint.py."""

    listing = "listing"  # name, size and label of each image
    full = "full"  # its bytes too


class OnBadImage(Enum):
    """What a run does about images that cannot be decoded: stop, or leave them out and list them."""

    stop = "stop"
    skip = "skip"


class Resize(Enum):
    """Name how a probe resizes an image; the paper's probes use `bilinear`."""

    bicubic = "bicubic"
    bilinear = "bilinear"


@dataclass
class DataConfig:
    """The image set, its splits, and how training views are drawn."""

    name: DatasetName = DatasetName.digits
    # Folder of the set; "": the default place. In version 0.1 it identified an image folder.
    root: str = field(default="", metadata={"neutral": lambda data: data.name not in OWN_SETS or bool(data.fingerprint)})
    # Of a user's own images, filled in when the run is planned: cnnjepa/data/fingerprint.py.
    fingerprint: str = field(default="", metadata=ADDED)
    verify: Verify = field(default=Verify.listing, metadata=NEUTRAL)  # the fingerprint says which it was
    image_size: int = 32  # pixels, training and probing
    min_crop_scale: float = 0.2  # smallest share of the image's area that a training crop may take
    flip_probability: float = 0.5
    eval_crop_fraction: float = 0.875  # centre share of the resized image that a probe sees: 224 of 256
    probe_resize: Resize = field(default=Resize.bicubic, metadata=ADDED)
    train_limit: int = 0  # use the first N training images of a fixed shuffle; 0 takes all
    test_limit: int = 0
    holdout_fraction: float = 0.1  # share of the training labels kept for selection
    # Share of the images that become the test images of an image folder without val/.
    val_fraction: float = field(default=0.0, metadata=ADDED)
    workers: int = field(default=0, metadata=NEUTRAL)  # loader processes per rank
    # Short side in pixels and JPEG quality of a shrunk packed set; 0: images are unchanged.
    short_side: int = field(default=0, metadata=ADDED)
    jpeg_quality: int = field(default=0, metadata=ADDED)
    # Decode at 1/2, 1/4 or 1/8 size where every crop stays at least as large as its view.
    dct_scaling: bool = field(default=False, metadata=ADDED)
    channels: int = field(default=3, metadata=ADDED)  # 1: grey, 3: RGB, 4: all bands of files that have four
    # Of each channel, with pixels in [0, 1]; []: the set's own, for image files those of ImageNet in RGB.
    mean: list[float] = field(default_factory=list, metadata=ADDED)
    std: list[float] = field(default_factory=list, metadata=ADDED)
    on_bad_image: OnBadImage = field(default=OnBadImage.stop, metadata=ADDED)  # skip: at most a tenth of the images


DATA_PRESETS: dict[str, DataConfig] = {
    # A mirrored digit is a different sign, and a crop below half of an 8x8 digit is unrecognisable.
    "digits": DataConfig(
        DatasetName.digits, image_size=32, min_crop_scale=0.5, flip_probability=0.0, eval_crop_fraction=1.0, holdout_fraction=0.2
    ),
    "fashion_mnist": DataConfig(DatasetName.fashion_mnist, image_size=32, eval_crop_fraction=1.0),
    "imagefolder": DataConfig(DatasetName.imagefolder, image_size=224),
    "images": DataConfig(DatasetName.images, image_size=224),
    **{
        name.name: DataConfig(name, image_size=224, probe_resize=Resize.bilinear, holdout_fraction=0.05, workers=8)
        for name in (DatasetName.imagenet100, DatasetName.imagenet100_kaggle)
    },
    "imagenet1k": DataConfig(DatasetName.imagenet1k, image_size=224, probe_resize=Resize.bilinear, holdout_fraction=0.02, workers=8),
}


def other_set(entry: str, data: DataConfig) -> DataConfig:
    """Return the set that an entry of `probes.data` names, at the size and with the channels of the run's own `data`.

    It has its own mean and deviation, or those of `data` if it has none. Raises ValueError unless the
    entry is NAME or NAME:ROOT of a data preset.
    """
    name, colon, root = entry.partition(":")
    if name not in DATA_PRESETS or (colon and not root.startswith("/")):
        rule = f"hold NAME or NAME:ROOT, NAME out of {', '.join(DATA_PRESETS)} and ROOT an absolute path"
        hint = "" if colon else ": put an entry that holds a comma in quotes"
        raise ValueError(f"probes.data must {rule}; got {entry}{hint}")
    if name == DatasetName.images.name:
        raise ValueError(f"probes.data must hold sets with labels; got {entry}: use imagefolder:ROOT")
    own = replace(DATA_PRESETS[name], root=root, image_size=data.image_size, workers=data.workers, channels=data.channels)
    return own if has_statistics(own) else replace(own, mean=data.mean, std=data.std)


GREY_SETS = (DatasetName.digits, DatasetName.fashion_mnist)


def has_statistics(data: DataConfig) -> bool:
    """Return whether the set has a mean and a deviation of its own for the channels of `data`."""
    return data.name in GREY_SETS or data.channels == 3
