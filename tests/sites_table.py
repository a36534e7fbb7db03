"""The table in docs/reference/site-conditions.md, from what the tests on a real Slurm wrote down.

SITES_JSON=sites.json pytest tests/sweeps/execution/test_site_conditions.py && python tests/sites_table.py sites.json
"""

import json
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "site-conditions.md"
BEGIN, END = "<!-- conditions: written by tests/sites_table.py -->", "<!-- end of conditions -->"
HEAD = ["condition", "what happened", "trials completed", "trials lost", "jobs doubled", "idle, s", "loading, s"]
KEYS = ["condition", "happened", "completed", "lost", "doubled", "idle", "loading"]


def table(entries: list[dict[str, object]]) -> str:
    """Return Markdown with one line a condition."""
    lines = [f"| {' | '.join(HEAD)} |", "|---|---|" + "---:|" * 5]
    return "\n".join([*lines, *(f"| {' | '.join(str(e[key]) for key in KEYS)} |" for e in entries)])


def rows(page: str) -> list[list[str]]:
    """Return the cells of each line of the page's table."""
    lines = page.split(BEGIN)[1].split(END)[0].splitlines()
    found = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")]
    return found[1:]


def main() -> None:
    """Rewrite the table in the order of the tests; a condition that was tested twice is taken from its last run."""
    from tests.support.conditions_of_sites import CONDITIONS

    entries = {e["condition"]: e for e in map(json.loads, Path(sys.argv[1]).read_text().splitlines())}
    if missing := [c.name for c in CONDITIONS if c.name not in entries]:
        raise SystemExit(f"{sys.argv[1]} must have a line for each condition; it lacks {missing[0]}")
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table([entries[c.name] for c in CONDITIONS])}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
