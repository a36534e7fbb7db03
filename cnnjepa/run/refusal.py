"""Note in the run folder that the disk refuses what a run writes, so that `status` can say so.

The file is refused.txt, under the attempt's number. It holds the cause, or nothing where the disk
has no room for that either, and is removed with the next write that succeeds.
"""

import contextlib
from pathlib import Path

from cnnjepa.run.attempts import numbered

_NAME = "refused.txt"


def note(run: Path, attempt: int, error: OSError | None) -> None:
    """Note the error of a write, or with None that writes succeed."""
    file = numbered(run / _NAME, attempt)
    with contextlib.suppress(OSError):
        if error is None:
            file.unlink(missing_ok=True)
        else:
            file.touch()
            file.write_text(f"{error}\n")


def noted(run: Path, attempt: int) -> str:
    """Return why the disk refuses what an attempt writes, in one line, or "" if it does not."""
    try:
        return " ".join(numbered(run / _NAME, attempt).read_text(errors="replace").split()) or "no space for the cause"
    except OSError:
        return ""
