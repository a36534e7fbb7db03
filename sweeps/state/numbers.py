"""Give each trial its number once: numbers/<batch>.json, run ID -> number, of a sweep without a search.

A batch is created when trials enter the folder, and never changed. So a trial keeps its number when
the sweep's file changes, and also when it is withdrawn and comes back; no number is given twice.
A search numbers its trials as it chooses them: points/<number>.json.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from cnnjepa.run.files import create_exclusive, read_json, reading, sealed_json
from cnnjepa.run.typed import checked
from sweeps.spec.sweep import Trial

_BATCH = re.compile(r"[0-9]{6}\.json")


def renumber(folder: Path, trials: list[Trial], written: Sequence[Trial] | None = None) -> None:
    """Number `trials` in place, as `give` would; write nothing.

    `written` are the trials in sweep.json, if they are known.
    """
    recorded = None if written is None else {t.signature: t.number for t in written}
    _apply(trials, _extended(folder, [t.signature for t in trials], _given(folder), recorded))


def give(folder: Path, trials: list[Trial]) -> None:
    """Number `trials` in place, and record the numbers of those that are new to the folder."""
    while True:
        given = _given(folder)
        found = _extended(folder, [t.signature for t in trials], given, None)
        new = {signature: number for signature, number in found.items() if signature not in given}
        # Another command may take the batch first, with other trials: then look again.
        if not new or create_exclusive(_next_batch(folder), sealed_json({"numbers": new})):
            _apply(trials, found)
            return


def _apply(trials: list[Trial], numbers: dict[str, int]) -> None:
    trials[:] = [t if t.number == numbers[t.signature] else replace(t, number=numbers[t.signature]) for t in trials]


def _batches(folder: Path) -> list[Path]:
    return sorted(p for p in (folder / "numbers").glob("*.json") if _BATCH.fullmatch(p.name))


def _next_batch(folder: Path) -> Path:
    (folder / "numbers").mkdir(exist_ok=True)
    last = max((int(p.stem) for p in _batches(folder)), default=-1)
    return folder / "numbers" / f"{last + 1:06d}.json"


def _given(folder: Path) -> dict[str, int]:
    """Return run ID -> number as recorded; raise DamagedError if a batch is not as it was written."""
    found: dict[str, int] = {}
    for path in _batches(folder):
        with reading(path):
            batch = checked(dict[str, int], read_json(path)["numbers"], "numbers")
            if twice := [number for number in batch.values() if number < 0 or number in found.values()]:
                raise TypeError(f"numbers must be given once, from 0; got {twice[0]}")
            found |= batch
    return found


def _extended(folder: Path, signatures: Iterable[str], given: dict[str, int], recorded: dict[str, int] | None) -> dict[str, int]:
    """Return `given` with a number for each trial of sweep.json, and then for each of `signatures`, that has none.

    The folders of earlier versions have numbers only in sweep.json.
    """
    wanted = [s for s in signatures if s not in given]
    found = dict(given)
    if wanted or not given:
        taken = set(given.values())
        known = _recorded(folder) if recorded is None else recorded
        found |= {s: number for s, number in known.items() if s not in given and number not in taken}
    free = max([*found.values(), *_chosen(folder)], default=-1) + 1 if wanted else 0
    for signature in wanted:
        if signature not in found:
            found[signature], free = free, free + 1
    return found


def _recorded(folder: Path) -> dict[str, int]:
    """Return run ID -> number of the trials in sweep.json, {} without one."""
    file = folder / "sweep.json"
    if not file.exists():
        return {}
    with reading(file):
        return {t["signature"]: checked(int, t["number"], "number") for t in read_json(file)["trials"]}


def _chosen(folder: Path) -> list[int]:
    """Return the numbers that a search in the same folder has given."""
    return [int(p.stem) for p in (folder / "points").glob("*.json") if _BATCH.fullmatch(p.name)]
