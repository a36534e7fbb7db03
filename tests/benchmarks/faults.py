"""Is anything ever lost? A seeded campaign of faults on this machine: killed, cut off, cut short, without a disk, back in time.

python tests/benchmarks/faults.py                       300 faults, about half an hour on two cores
python tests/benchmarks/faults.py --json > campaign.json && python tests/campaign_table.py campaign.json  # writes the docs table
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from _report import publish
from rich.table import Table

from sweeps.drill.campaign import drill
from sweeps.drill.local_faults import RunHere
from sweeps.drill.summary import by_kind, figures


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exit status 1 where anything was lost, doubled or different."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=300)
    parser.add_argument("--seed", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args(arguments)
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - started:7.1f} s  {text}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="cnnjepa-faults-") as folder:
        found = drill(lambda name: RunHere(Path(folder) / name, []), asked.faults, asked.seed, say)
    kinds = by_kind(found)
    table = Table("fault", "times", "steps repeated", "seconds lost, mean", "most", title="faults, and what they cost")
    for name, times, steps, mean, most in kinds:
        table.add_row(name, str(times), str(steps), f"{mean:.1f}", f"{most:.1f}")
    reported = figures(found)
    notes = [", ".join(f"{key} {value:.3g}" for key, value in reported.items())]
    publish(asked.json, len(found.injected), {**reported, "kinds": kinds, "minutes": (time.monotonic() - started) / 60}, table, notes)
    return 0 if found.holds and len(found.injected) == asked.faults else 1


if __name__ == "__main__":
    sys.exit(main())
