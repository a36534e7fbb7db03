"""The table of the campaign of faults in docs/guides/drill.md, from what its benchmark has measured.

python tests/benchmarks/faults.py --json > campaign.json && python tests/campaign_table.py campaign.json
"""

import json
import sys
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parent.parent / "docs" / "guides" / "drill.md"
BEGIN, END = "<!-- campaign: written by tests/campaign_table.py -->", "<!-- end of campaign -->"


def table(measured: dict[str, Any]) -> str:
    """Markdown: one line a kind of fault, the dearest first, and the sum."""
    told, here = measured["figures"], measured["machine"]
    lines = ["| fault | times | steps repeated | seconds lost, mean | at most |", "|---|---:|---:|---:|---:|"]
    lines += [f"| {name} | {times} | {steps} | {mean:.1f} | {most:.1f} |" for name, times, steps, mean, most in told["kinds"]]
    lines += [f"| **all** | **{told['faults']}** | {told['steps_repeated']} | **{told['seconds_lost_mean']:.1f}** | |", ""]
    lines += [
        f"**Runs lost: {told['lost']}. Records or rows there twice: {told['duplicated']}. Differing bits: {told['different_bits']}.** "
        f"{told['runs']} runs of 200 steps, each held against one that was left in peace;",
        f"`{measured['command']}`, {told['minutes']:.0f} minutes on {here['cores']} cores ({here['cpu']}) shared with other work, "
        f"torch {here['torch']}.",
    ]
    return "\n".join(lines)


def block(page: str) -> str:
    """What stands between the marks."""
    return page.split(BEGIN)[1].split(END)[0]


def main() -> None:
    """Rewrite the table in place."""
    measured = json.loads(Path(sys.argv[1]).read_text())
    text = PAGE.read_text()
    PAGE.write_text(f"{text.split(BEGIN)[0]}{BEGIN}\n{table(measured)}\n{END}{text.split(END)[1]}")


if __name__ == "__main__":
    main()
