"""Leave out the images that cannot be decoded, where data.on_bad_image=skip asks for it."""

import logging
from pathlib import Path

import numpy as np

from cnnjepa.config import TrainConfig
from cnnjepa.data.datasets import Splits, require_roles
from cnnjepa.data.faults import DamagedImagesError, raise_alike
from cnnjepa.data.opened import Files, in_files, look
from cnnjepa.data_config import DataConfig, OnBadImage
from cnnjepa.run import checkpoint, skipped
from cnnjepa.run.folder import HopelessError, RunFolder
from cnnjepa.run.ranks import Ranks, broadcast_object, gathered
from cnnjepa.run.skipped import Skipped, SkippedImages

log = logging.getLogger(__name__)
# A larger share is no stray damage: a copy that broke off, or a format that cannot be read.
MOST = 0.1
_SPLITS = ("train", "test")


def without_bad(splits: Splits, config: TrainConfig, folder: RunFolder, ranks: Ranks) -> Splits:
    """Return the splits without the images that the run leaves out, the same on every rank.

    A run that begins decodes all its images, each rank a share, and lists the bad ones. Later only
    the list is read. Raise HopelessError on every rank if more than `MOST` cannot be decoded, or the
    list is damaged or gone, and LoadingError if the system could not read an image.
    """
    if not _skips(splits, config.data):
        return splits
    listed: SkippedImages | None = None
    fault: Exception | None = None
    try:
        listed = skipped.read(folder.path) if ranks.is_main else None
        if ranks.is_main and listed is None and checkpoint.find(folder.checkpoints):
            remedy = "restore it from a copy, or move the checkpoints away to begin again"
            raise ValueError(f"{skipped.NAME} must be in the folder of a run that has begun; got none in {folder.path}: {remedy}")
    except ValueError as error:
        fault = HopelessError(str(error))
    raise_alike(fault, ranks)
    if (listed := broadcast_object(listed, ranks)) is None:
        listed = _begin(splits, config, folder, ranks)
    try:
        splits = _without(splits, listed, config.data, folder.path)
    except ValueError as error:
        fault = HopelessError(str(error))
    raise_alike(fault, ranks)
    return splits


def without_listed(splits: Splits, data: DataConfig, folder: RunFolder) -> Splits:
    """Return the splits that a run was trained with; raise ValueError if its list is damaged or gone."""
    if not _skips(splits, data):
        return splits
    if (listed := skipped.read(folder.path)) is None:
        rule = "be in the folder of a run with data.on_bad_image=skip"
        raise ValueError(f"{skipped.NAME} must {rule}; got none in {folder.path}: restore it from a copy")
    return _without(splits, listed, data, folder.path)


def _skips(splits: Splits, data: DataConfig) -> bool:
    return data.on_bad_image is OnBadImage.skip and bool(in_files([(splits.dataset.train, splits.pretrain)]))


def _name(images: Files, index: int, data: DataConfig) -> str:
    """Return the image's place below data.root, which a staged copy shares."""
    return images.place(index).removeprefix(f"{Path(data.root)}/")


def _begin(splits: Splits, config: TrainConfig, folder: RunFolder, ranks: Ranks) -> SkippedImages:
    """Decode all images of the run, each rank a share; write the list of the bad ones and return it."""
    whole = in_files([(splits.dataset.train, splits.pretrain), (splits.dataset.test, splits.test)])
    images = sum(len(indices) for _, indices in whole)
    if ranks.is_main:
        log.warning("decoding all %s images once, as data.on_bad_image=skip asks", f"{images:,}")
    mine: list[Skipped] = []
    fault: Exception | None = None
    try:
        found = look([(part, indices[ranks.rank :: ranks.count]) for part, indices in whole], max(config.threads, config.data.workers))
        for split, (part, _), bad in zip(_SPLITS, whole, found, strict=True):
            mine += [Skipped(split, one.index, _name(part, one.index, config.data), one.cause) for one in bad]
    except Exception as error:  # of this rank alone: the others are told
        fault = error
    raise_alike(fault, ranks)
    everyone = [one for theirs in gathered(mine, ranks) for one in theirs]
    listed = SkippedImages(images, sorted(everyone, key=lambda one: (_SPLITS.index(one.split), one.index)))
    if len(listed.skipped) > MOST * images:
        first = listed.skipped[0]
        rule = f"leaves out at most {100 * MOST:.0f} % of the images"
        got = f"{len(listed.skipped):,} of {images:,} that cannot be decoded, the first {first.name}: {first.cause}"
        raise DamagedImagesError(f"data.on_bad_image must be used where it {rule}; got {got}: repair them, or correct data.root")
    standing: SkippedImages | None = None
    try:
        if ranks.is_main:
            skipped.write(folder.path, listed)
            standing = skipped.read(folder.path)  # an earlier attempt's, if that was faster
    except (OSError, ValueError) as error:
        fault = error
    raise_alike(fault, ranks)
    if (standing := broadcast_object(standing, ranks)) is not None and standing.skipped and ranks.is_main:
        log.warning("%s: %s", standing.line, folder.path / skipped.NAME)
    assert standing is not None
    return standing


def _without(splits: Splits, listed: SkippedImages, data: DataConfig, run: Path) -> Splits:
    """Return the splits without what is listed; raise ValueError if that is not of this set."""
    gone = {}
    for split, (images, _) in zip(_SPLITS, in_files([(splits.dataset.train, splits.pretrain), (splits.dataset.test, splits.test)])):
        mine = [one for one in listed.skipped if one.split == split]
        for one in mine:
            if not 0 <= one.index < len(images) or _name(images, one.index, data) != one.name:
                got = f"{one.name}, which is not image {one.index} of {split}"
                remedy = "restore the set, or move the run folder away to begin again"
                raise ValueError(f"{run / skipped.NAME} must list images of data.root as it is; got {got}: {remedy}")
        gone[split] = np.array([one.index for one in mine], dtype=np.int64)
    pretrain, fit, holdout = (np.setdiff1d(part, gone["train"]) for part in (splits.pretrain, splits.fit, splits.holdout))
    return require_roles(Splits(splits.dataset, pretrain, fit, holdout, np.setdiff1d(splits.test, gone["test"])), data)
