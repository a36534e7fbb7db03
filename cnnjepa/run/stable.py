"""Keep the checkpoint at the end of a run's stable phase, and let a longer run begin with it.

Up to there nothing depends on how long a run is (`optimizer.schedule=wsd`). A longer run with the
same configuration else would come to the same checkpoint and the same records, bit for bit on CPU.
"""

import logging
from pathlib import Path
from typing import Any

from cnnjepa.run import checkpoint
from cnnjepa.run.attempts import numbered
from cnnjepa.run.checkpoint import Checkpoint
from cnnjepa.run.files import link_or_copy, sync_folder, write_atomic
from cnnjepa.run.folder import RunFolder

log = logging.getLogger(__name__)
NAME = "stable"


def keep(folder: RunFolder, step: int, state: dict[str, Any]) -> None:
    """Save the state apart from the other checkpoints, which are removed in turn. A disk that refuses costs no more than that."""
    try:
        folder.sync()
        checkpoint.save(folder.path / NAME, step, state, 1, folder.attempt)
    except OSError as error:
        log.warning("the checkpoint at the end of the stable phase, step %d, is not kept: %s", step, error)


def kept(run: Path) -> Checkpoint | None:
    """Return the intact checkpoint that the run in `run` has kept, or None."""
    return next(checkpoint.intact(run / NAME), None)


def begin_with(folder: RunFolder, other: Path) -> int:
    """Let the run in `folder`, unless it has begun, begin with what the run in `other` kept; return its step, or 0."""
    found = kept(other)
    if found is None or checkpoint.find(folder.checkpoints) or folder.records.exists():
        return 0
    mark, records = checkpoint.peek(found, "records"), numbered(other / "metrics.jsonl", found.attempt)
    data = records.read_bytes()[: mark["bytes"]]
    if not RunFolder(other).holds(mark, found.attempt):
        return 0
    folder.checkpoints.mkdir(parents=True, exist_ok=True)
    write_atomic(numbered(folder.path / "metrics.jsonl", folder.attempt), data)
    link_or_copy(found.path, checkpoint.named(folder.checkpoints, found.step, folder.attempt, found.digest).path)
    sync_folder(folder.checkpoints)
    return found.step
