"""Does an owner that was suspended and wakes up after a takeover change anything? A seeded campaign on this machine.

python tests/benchmarks/takeovers.py [--takeovers 30] [--seed 19] [--json]        30 takeovers, a few minutes on two cores
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from _report import publish
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.support.takeovers import WAYS, campaign


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exit status 1 where a record, a bit or a checkpoint is lost."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--takeovers", type=int, default=30)
    parser.add_argument("--seed", default="19")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args(arguments)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="cnnjepa-takeovers-") as folder:
        found = campaign(Path(folder), asked.takeovers, asked.seed)
    table = Table("the suspended owner is", "takeovers", "attempts", title="takeovers from suspended owners")
    for way in WAYS:
        of = [f for f in found if f.way == way]
        table.add_row(way, str(len(of)), str(sum(f.attempts for f in of)))
    figures = {
        "takeovers": len(found),
        "attempts": sum(f.attempts for f in found),
        "lost": sum(bool(f.proof.lost) for f in found),
        "records_lost": sum(f.records_lost for f in found),
        "duplicated": sum(len(f.proof.duplicated) for f in found),
        "different_bits": sum(f.proof.different_bits for f in found),
        "different": [what for f in found for whats in f.proof.different.values() for what in whats],
        "others_deleted": sum(len(f.others_deleted) for f in found),
        "minutes": (time.monotonic() - started) / 60,
    }
    publish(asked.json, len(found), figures, table, [", ".join(f"{key} {value}" for key, value in figures.items())])
    return 0 if all(f.holds for f in found) else 1


if __name__ == "__main__":
    sys.exit(main())
