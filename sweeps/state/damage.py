"""Keep trials whose folders cannot be read apart: a damaged file costs one trial, not the sweep."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from cnnjepa.run.files import DamagedError
from jobs.cli import printable

R = TypeVar("R")
S = TypeVar("S")


def cause_of(error: Exception, folder: Path) -> str:
    """Return 'damaged: <file>: <what to do> (<what is wrong>)' for an error about a trial's `folder`."""
    if not isinstance(error, DamagedError):
        named = getattr(error, "filename", None)
        error = DamagedError(Path(named) if isinstance(named, str) else folder, getattr(error, "strerror", None) or str(error))
    path = error.path
    name = path.relative_to(folder) if path != folder and path.is_relative_to(folder) else Path(path.parent.name) / path.name
    return printable(f"damaged: {name}: {error.remedy} ({error.said})")


class Damage:
    """The trials that were found damaged, by run ID, with their causes."""

    def __init__(self) -> None:
        self._causes: dict[str, str] = {}

    def of(self, signature: str) -> str:
        """Return why the trial's folder cannot be read, or "" if it can."""
        return self._causes.get(signature, "")

    def forget(self, signature: str) -> None:
        """Forget it: the folder is looked at again."""
        self._causes.pop(signature, None)

    def guard(self, folder: Path, read: Callable[[], R], instead: S) -> R | S:
        """Return what `read` returns; if it fails on the trial's folder, note the cause and return `instead`."""
        try:
            return read()
        except (ValueError, OSError) as error:
            self._causes.setdefault(folder.name, cause_of(error, folder))  # the first cause stays until `forget`
            return instead
