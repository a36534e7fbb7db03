"""The table of the campaign of faults in docs/how-it-works/fault-injection.md, from what its benchmark has measured.

python tests/benchmarks/faults.py --json > campaign.json && python tests/campaign_table.py campaign.json
"""

import json
import sys
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parent.parent / "docs" / "how-it-works" / "fault-injection.md"
BEGIN, END = "<!-- campaign: written by tests/campaign_table.py -->", "<!-- end of campaign -->"


def table(measured: dict[str, Any]) -> str:
    """Return Markdown: one line per kind of fault, the most expensive first, and the sum."""
    figures, here = measured["figures"], measured["machine"]
    lines = ["| fault | times | steps repeated | seconds lost, mean | at most |", "|---|---:|---:|---:|---:|"]
    lines += [f"| {name} | {times} | {steps} | {mean:.1f} | {most:.1f} |" for name, times, steps, mean, most in figures["kinds"]]
    lines += [f"| **all** | **{figures['faults']}** | {figures['steps_repeated']} | **{figures['seconds_lost_mean']:.1f}** | |", ""]
    lines += [
        f"**Runs lost: {figures['lost']}. Duplicated records or rows: {figures['duplicated']}. "
        f"Differing bits: {figures['different_bits']}.** {figures['runs']} runs of 200 steps,",
        "each compared with an undisturbed reference run;",
        f"`{measured['command']}`, {figures['minutes']:.0f} minutes",
        f"on {here['cores']} cores ({here['cpu']}) shared with other work, torch {here['torch']}.",
    ]
    return "\n".join(lines)


def block(page: str) -> str:
    """Return the text between the marks."""
    return page.split(BEGIN)[1].split(END)[0]


def main() -> None:
    """Rewrite the table in place."""
    measured = json.loads(Path(sys.argv[1]).read_text())
    text = PAGE.read_text()
    PAGE.write_text(f"{text.split(BEGIN)[0]}{BEGIN}\n{table(measured)}\n{END}{text.split(END)[1]}")


if __name__ == "__main__":
    main()
