"""Does a damaged file cost more than its own trial? Seeded damages to every kind of file of small sweep folders, and every command on each.

python tests/benchmarks/damage.py                  600 damages, about ten minutes on two cores
python tests/benchmarks/damage.py --damages 50 --seed 3 --json
"""

import argparse
import os
import pickle
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from _report import publish
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.support import damage
from tests.support.damage import Damage, Found


def share(bases: dict[str, Path], damages: Sequence[Damage], work: Path) -> int:
    """Judge damages in a fork of this process; return its number. What it finds is in `work`/found."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work.mkdir()
        found = [damage.judged(one, bases[one.sweep], work) for one in damages]
        (work / "found").write_bytes(pickle.dumps(found))
        status = 0
    finally:
        os._exit(status)


def campaign(count: int, seed: int, processes: int, folder: Path) -> list[Found]:
    """Judge `count` damages in so many processes."""
    with pytest.MonkeyPatch.context() as patch:
        damage.prepare(patch)
        bases = damage.bases(folder)
        damages = damage.drawn(bases, count, seed)
        works = [folder / f"work-{i}" for i in range(processes)]
        children = [share(bases, damages[i::processes], work) for i, work in enumerate(works)]
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if any(statuses):
            raise ChildProcessError("a process that judges damages has ended with an error, printed above")
    return [found for work in works for found in pickle.loads((work / "found").read_bytes())]  # noqa: S301, our own file


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exit status 1 where a damage did more than it may."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--damages", type=int, default=600)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args(arguments)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="cnnjepa-damage-") as folder:
        found = campaign(asked.damages, asked.seed, asked.processes, Path(folder))
    for one in found:
        for fault in one.faults:
            print(f"{one.damage} ({one.what}): {fault}", file=sys.stderr)
    kinds, bad = Counter(one.damage.kind for one in found), Counter(one.damage.kind for one in found if one.faults)
    named = Counter(one.damage.kind for one in found if one.named)
    table = Table("file", "damages", "named", "faults", title="damages to files of a sweep folder")
    for kind, times in sorted(kinds.items()):
        table.add_row(kind, str(times), str(named[kind]), str(bad[kind]))
    figures = {name: sum(len(getattr(one, name)) for one in found) for name in ("tracebacks", "loops", "silent", "not_ended")}
    figures["named"] = sum(named.values())
    reported = {**figures, "actions": dict(Counter(one.damage.action for one in found)), "minutes": (time.monotonic() - started) / 60}
    notes = [", ".join(f"{key} {value}" for key, value in figures.items())]
    publish(asked.json, len(found), reported, table, notes)
    return 1 if any(one.faults for one in found) or len(found) != asked.damages else 0


if __name__ == "__main__":
    sys.exit(main())
