"""`python -m sweeps status|results SWEEP_FOLDER`: look at a sweep, running or ended; nothing is started."""

import argparse
import json
import sys
from pathlib import Path

from sweeps import results
from sweeps.command import wide_console
from sweeps.folder import Sweep, View
from sweeps.status import counts_line, live_table, sweep_status


def main() -> int:
    """The door; exit status 2 where the folder holds no sweep."""
    parser = argparse.ArgumentParser(prog="python -m sweeps", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    status = commands.add_parser("status", help="where the trials stand")
    status.add_argument("--json", action="store_true", help="one JSON object")
    table = commands.add_parser("results", help="rebuild results.csv, summary.csv and ablation.png, and print the table")
    table.add_argument("--format", choices=["table", "csv", "markdown"], default="table")
    for command in (status, table):
        command.add_argument("folder", type=Path)
    asked = parser.parse_args()
    try:
        view = View(Sweep.load(asked.folder.resolve()))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console = wide_console()
    if asked.command == "status":
        found = sweep_status(view)
        if asked.json:
            print(json.dumps(found))
        else:
            console.print(live_table(found, None))
            console.print(counts_line(found), highlight=False)
        return 0
    results.write_all(view)
    if asked.format == "table":
        console.print(results.terminal_table(view))
    else:
        print(results.summary_csv(view) if asked.format == "csv" else results.markdown_table(view), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
