"""Find a trial by what people call it: its number, name, run ID, CONFIGURATION/SEED, or a path.

The files of a sweep folder are read as they are: nothing of the sweep's own code is needed.
"""

import difflib
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from cnnjepa.run.files import DamagedError, read_json, reading
from cnnjepa.run.typed import checked
from jobs.cli import resolved
from jobs.trial_names import number_and_seed, trial_name

BATCH = re.compile(r"[0-9]{6}\.json")
HOW = "its number, its name, its run ID or the start of it, or CONFIGURATION/SEED"
_NEAREST = 3


class Named(Protocol):
    """What a trial is called."""

    @property
    def number(self) -> int:
        """Return its number in the sweep."""

    @property
    def label(self) -> str:
        """Return the name of its configuration."""

    @property
    def seed(self) -> int:
        """Return its seed."""

    @property
    def signature(self) -> str:
        """Return its run ID."""

    @property
    def name(self) -> str:
        """Return its name, such as 03-depth2-seed43."""


T = TypeVar("T", bound=Named)


@dataclass(frozen=True)
class Listed:
    """A trial as the files of a sweep folder list it."""

    number: int
    label: str
    seed: int
    signature: str
    overrides: list[str]  # [] if an earlier version planned it
    values: dict[str, Any] | None  # its configuration; None where a search has chosen it

    @property
    def name(self) -> str:
        """Return its name, such as 03-depth2-seed43."""
        return trial_name(self.number, self.label, self.seed)


def find(trials: Sequence[T], name: str) -> T:
    """Return the trial that `name` means; raise ValueError, with the nearest names, unless it means exactly one."""
    found = _meant(trials, name)
    if len(found) == 1:
        return found[0]
    if found:
        more = ", ..." * (len(found) > _NEAREST)
        raise ValueError(f"TRIAL must name one trial by {HOW}; got {name}, which may be {_names(found[:_NEAREST])}{more}")
    numbers = [t.number for t in trials]
    among = f"{len(trials)} trials, numbered from {min(numbers)} to {max(numbers)}" if numbers else "no trial"
    raise ValueError(f"TRIAL must name one trial by {HOW}; got {name}, which names none of {among}{_nearest(trials, name)}")


def _meant(trials: Sequence[T], name: str) -> list[T]:
    """Return the trials of the first way of naming that fits any."""
    number, renamed = int(name) if name.isdecimal() and name.isascii() else None, number_and_seed(name)
    ways = (
        lambda t: t.signature == name,
        lambda t: t.number == number,
        lambda t: t.name == name,
        lambda t: f"{t.label}/{t.seed}" == name,
        lambda t: (t.number, t.seed) == renamed,  # its configuration was called otherwise once
        lambda t: bool(name) and t.signature.startswith(name),
    )
    return next((found for way in ways if (found := [t for t in trials if way(t)])), [])


def _nearest(trials: Sequence[T], name: str) -> str:
    known = {called: t for t in trials for called in (t.name, f"{t.label}/{t.seed}", t.name.partition("-")[2])}
    near = difflib.get_close_matches(name, known, _NEAREST)
    return f"; the nearest: {_names(list({known[n].signature: known[n] for n in near}.values()))}" if near else ""


def _names(trials: Sequence[Named]) -> str:
    return ", ".join(t.name for t in trials)


def given_numbers(written: Sequence[Path]) -> dict[str, int]:
    """Return run ID -> number as recorded in `batches`; raise DamagedError if a file is not as it was written."""
    found: dict[str, int] = {}
    for path in written:
        with reading(path):
            batch = checked(dict[str, int], read_json(path)["numbers"], "numbers")
            if twice := [number for number in batch.values() if number < 0 or number in found.values()]:
                raise TypeError(f"numbers must be given once, from 0; got {twice[0]}")
            found |= batch
    return found


def batches(sweep: Path) -> list[Path]:
    """Return the files that record numbers, in the order in which they were written."""
    return sorted(p for p in (sweep / "numbers").glob("*.json") if BATCH.fullmatch(p.name))


def listed(sweep: Path) -> list[Listed]:
    """Return the trials of a sweep folder, in its order; raise DamagedError if its files cannot be read."""
    file = sweep / "sweep.json"
    with reading(file):
        values = read_json(file)
        trials = [_listed(t) for t in checked(list[dict[str, Any]], values["trials"], "trials")]
        digest = values["search"]["digest"] if values["search"] else None
    if digest is None:
        numbers = given_numbers(batches(sweep))
        return [replace(t, number=numbers.get(t.signature, t.number)) for t in trials]
    for path in sorted(p for p in (sweep / "points").glob("*.json") if BATCH.fullmatch(p.name)):
        with suppress(DamagedError), reading(path):  # it costs its own trial
            choice = read_json(path)
            if choice["search"] == digest:
                trials.append(_listed(choice))
    return trials


def _listed(values: dict[str, Any]) -> Listed:
    number, label = checked(int, values["number"], "number"), checked(str, values["setting"], "setting")
    seed, run_id = checked(int, values["seed"], "seed"), checked(str, values["signature"], "signature")
    given = checked(list[str], values.get("overrides", []), "overrides")
    return Listed(number, label, seed, run_id, given, checked(dict[str, Any] | None, values.get("values"), "values"))


def recorded(sweep: Path, run_id: str) -> Listed | None:
    """Return the trial of a sweep folder that has a run ID, None if it is not listed."""
    return next((t for t in listed(sweep) if t.signature == run_id), None)


def run_folder(path: Path, what: str) -> Path:
    """Return the run folder that `path` means: itself, or a trial's if it is SWEEP_FOLDER/TRIAL.

    What is no run folder, but neither names a trial, is returned as it is. Raise ValueError if the
    sweep has no such trial. `what` names the argument.
    """
    found = resolved(path, what)
    if found.exists():
        return found
    for folder in found.parents:
        if (folder / "sweep.json").exists():
            trial = find(listed(folder), str(found.relative_to(folder)))
            return folder / "trials" / trial.signature
    return found
