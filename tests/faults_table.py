"""The table of faults in docs/how-it-works/fault-injection.md, from what the tests on a real Slurm wrote down.

FAULTS_JSON=faults.json pytest tests/sweeps/execution/test_slurm_faults.py && python tests/faults_table.py faults.json
"""

import json
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs" / "how-it-works" / "fault-injection.md"
BEGIN, END = "<!-- faults: written by tests/faults_table.py -->", "<!-- end of faults -->"


def table(entries: list[dict[str, object]]) -> str:
    """Return Markdown with one line a fault."""
    lines = ["| fault | what happened | starts of the trials | training lost, s |", "|---|---|---:|---:|"]
    for e in entries:
        lines.append(f"| {e['fault']} | {e['happened']} | {e['starts']} for {e['trials']} | {e['seconds_lost']} |")
    return "\n".join(lines)


def block(page: str) -> str:
    """Return the text between the marks."""
    return page.split(BEGIN)[1].split(END)[0]


def faults_in(page: str) -> list[str]:
    """Return the faults that the page's table lists."""
    return [line.split("|")[1].strip() for line in block(page).splitlines() if line.startswith("| ") and not line.startswith("| fault ")]


def main() -> None:
    """Rewrite the table in place and in its order; a fault that was tested twice is taken from its last run."""
    entries = {e["fault"]: e for e in map(json.loads, Path(sys.argv[1]).read_text().splitlines())}
    text = PAGE.read_text()
    known = {fault: place for place, fault in enumerate(faults_in(text))}
    ordered = sorted(entries.values(), key=lambda e: known.get(str(e["fault"]), len(known)))  # tests run in any order
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{table(ordered)}\n{END}{after}")


if __name__ == "__main__":
    main()
