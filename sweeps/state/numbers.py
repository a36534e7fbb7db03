"""Give each trial its number once: numbers/<batch>.json, run ID -> number, of a sweep without a search.

A batch is created when trials enter the folder, and never changed. So a trial keeps its number when
the sweep's file changes, and also when it is withdrawn and comes back; no number is given twice.
A search numbers its trials as it chooses them: points/<number>.json.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from cnnjepa.run.files import create_exclusive, read_json, reading, sealed_json
from cnnjepa.run.typed import checked
from jobs.trials import BATCH, batches, given_numbers
from sweeps.spec.sweep import Trial


def renumber(folder: Path, trials: list[Trial], written: Sequence[Trial] | None = None) -> None:
    """Number `trials` in place, as `give` would; write nothing.

    `written` are the trials in sweep.json, if they are known.
    """
    recorded = None if written is None else {t.signature: t.number for t in written}
    _apply(trials, _extended(folder, [t.signature for t in trials], given_numbers(batches(folder)), recorded))


def give(folder: Path, trials: list[Trial]) -> None:
    """Number `trials` in place, and record the numbers of those that are new to the folder."""
    while True:
        written = batches(folder)  # listed once: what is created below must follow what is read here
        given = given_numbers(written)
        found = _extended(folder, [t.signature for t in trials], given, None)
        new = {signature: number for signature, number in found.items() if signature not in given}
        # Another command may take the batch first, with other trials: then look again.
        if not new or create_exclusive(_after(folder, written), sealed_json({"numbers": new})):
            _apply(trials, found)
            return


def _apply(trials: list[Trial], numbers: dict[str, int]) -> None:
    trials[:] = [t if t.number == numbers[t.signature] else replace(t, number=numbers[t.signature]) for t in trials]


def _after(folder: Path, written: Sequence[Path]) -> Path:
    (folder / "numbers").mkdir(exist_ok=True)
    return folder / "numbers" / f"{int(written[-1].stem) + 1 if written else 0:06d}.json"


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
    return [int(p.stem) for p in (folder / "points").glob("*.json") if BATCH.fullmatch(p.name)]
