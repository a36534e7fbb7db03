"""Hold the records of a run against its checkpoints and its result."""

import logging
import math
from typing import TYPE_CHECKING, Any

from cnnjepa.run import checkpoint
from cnnjepa.run.attempts import numbered
from cnnjepa.run.folder import HopelessError, RunFolder, RunResult, RunStatus
from cnnjepa.run.records import missing_steps, read_metrics

if TYPE_CHECKING:
    from cnnjepa.run.checkpoint import Checkpoint

log = logging.getLogger(__name__)
_TAIL_BYTES = 65_536  # more than a final record takes


class ImagesChangedError(HopelessError):
    """Raised on every rank when a run's images are no longer those that it began with."""


class PastTheEndError(HopelessError):
    """Raised when a checkpoint is past the run's last step: the run has become shorter."""


def starting_point(folder: RunFolder, last_step: int, every: int, images: int) -> "Checkpoint | None":
    """Return the newest intact checkpoint whose records are whole, None without a checkpoint.

    If no records are whole, return the newest checkpoint, and say in one line what is missing.
    Records are due at each `every`-th step. Raise ImagesChangedError if a checkpoint is of a run on
    other than `images` training images, and PastTheEndError if it is past `last_step`.
    """
    checkpoint.remove_partial(folder.checkpoints, folder.attempt)
    first, damaged = None, ""
    for found in checkpoint.intact(folder.checkpoints, folder.attempt, set_aside=True):
        if (then := checkpoint.peek(found, "images")) not in (None, images):  # 0.1 kept no count
            said = f"a run must keep its {then} training images; got {images} now that it resumes at step {found.step}"
            raise ImagesChangedError(f"{said} of {folder.path}: restore them, or move its folder away to start again")
        if found.step > last_step:
            said = f"a checkpoint must not be past the run's last step, {last_step}; got step {found.step} in {found.path}"
            raise PastTheEndError(f"{said}: does the run have fewer images now? Restore them, or move its folder away to start again")
        wrong = _missing(folder, found, every)
        if not wrong:
            if damaged:
                log.warning("%s: going back to the checkpoint at step %d, whose records are whole", damaged, found.step)
            return found
        first, damaged = first or found, damaged or wrong
    if first is not None:
        log.warning("%s, and no other checkpoint has whole records: the run continues without them", damaged)
    return first


def _missing(folder: RunFolder, found: "Checkpoint", every: int) -> str:
    """Return what is wrong with the records that lead to a checkpoint, or "" if they are whole."""
    mark = checkpoint.peek(found, "records")
    if mark is None or folder.holds(mark, found.attempt):  # 0.1 kept no mark
        return ""
    path = numbered(folder.path / "metrics.jsonl", found.attempt)
    gone = missing_steps(read_metrics(path), found.step, every)
    said = f"steps {gone[0]} to {gone[-1]} lack {len(gone)} records" if gone else "a line differs from what was recorded"
    return f"{path} does not match the checkpoint at step {found.step}: {said}"


def disagreement(folder: RunFolder, result: RunResult) -> str:
    """Return how the records of a run differ from what it recorded, or from its result; "" if not."""
    path = folder.records
    if not folder.holds(folder.mark(), folder.attempt):
        return f"{path} has changed since it was written: its curves are not those of this run"
    last = read_metrics(path, _TAIL_BYTES)[-1:]
    if result.status is RunStatus.completed and (
        not last or _scores(last[0]) != {k: v for k, v in result.metrics.items() if math.isfinite(v)}
    ):
        return f"{path} does not end with the scores of the result"
    return ""


def _scores(record: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a final record, {} if it is none."""
    return {k: v for k, v in record.items() if k not in ("kind", "step", "epoch") and v is not None} if record["kind"] == "final" else {}
