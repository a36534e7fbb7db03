"""The list of the images that a run leaves out because they cannot be decoded: skipped.json of its folder."""

from dataclasses import asdict, dataclass
from pathlib import Path

from cnnjepa.run.files import create_exclusive, read_json, reading, sealed_json
from cnnjepa.run.typed import build

NAME = "skipped.json"


@dataclass(frozen=True)
class Skipped:
    """One image that is left out."""

    split: str  # train or test
    index: int  # in the split
    name: str  # below the folder of the set
    cause: str


@dataclass(frozen=True)
class SkippedImages:
    """The images that are left out, and how many were looked at."""

    looked_at: int
    skipped: list[Skipped]

    @property
    def line(self) -> str:
        """Return how many of how many are left out."""
        return f"{len(self.skipped):,} of {self.looked_at:,} images cannot be decoded and are left out"


def write(run: Path, found: SkippedImages) -> bool:
    """Write the list to the run folder; return False, changing nothing, if it has one."""
    return create_exclusive(run / NAME, sealed_json(asdict(found)))


def read(run: Path) -> SkippedImages | None:
    """Return the list of the run folder, or None; raise DamagedError if it is not as it was written."""
    if not (run / NAME).exists():
        return None
    with reading(run / NAME):
        return build(SkippedImages, read_json(run / NAME))


def count(run: Path) -> int:
    """Return how many images the run leaves out."""
    found = read(run)
    return 0 if found is None else len(found.skipped)
