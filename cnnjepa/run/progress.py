"""Note how far a run is that keeps no checkpoints here, and how long it took, so that an attempt that gains nothing is seen.

`progress.N.json` in the run folder belongs to attempt N.
"""

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from cnnjepa.run.attempts import attempts_with, numbered
from cnnjepa.run.files import read_json
from cnnjepa.run.typed import build

_NAME = "progress.json"


@dataclass(frozen=True)
class Progress:
    """The last epoch or step that a run has reported, and the seconds that it took over all attempts."""

    step: int = 0
    seconds: float = 0.0


def read(run: Path, attempt: int = 0) -> Progress:
    """Return the progress that the newest attempt noted, none after `attempt`; one that cannot be read is none."""
    numbers = [number for number in attempts_with(run / _NAME) if not attempt or number <= attempt]
    for path in [*(numbered(run / _NAME, number) for number in numbers), run / _NAME]:
        with contextlib.suppress(OSError, ValueError, TypeError):
            return build(Progress, read_json(path))
    return Progress()


def write(run: Path, attempt: int, step: int, seconds: float) -> None:
    """Note the progress of an attempt. An error of the disk is ignored."""
    path = numbered(run / _NAME, attempt)
    with contextlib.suppress(OSError):
        beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        beside.write_text(json.dumps(asdict(Progress(step, seconds))))
        os.replace(beside, path)
