"""The table of fault-injection.md lists exactly the faults of a drill on this machine, at least 300 in all, with nothing lost."""

import re

from sweeps.drill.local_faults import RunHere
from tests.campaign_table import PAGE, block
from tests.support.documented import ROOT


def test_the_table_is_of_the_faults_that_are_done() -> None:
    held = block(PAGE.read_text())
    listed = [line.split("|")[1].strip() for line in held.splitlines() if line.startswith("| ")]
    run = object.__new__(RunHere)  # its faults are named without being started
    assert sorted(listed) == sorted(["fault", "**all**", *run.faults])


def test_at_least_300_were_done_and_nothing_was_lost() -> None:
    held = block(PAGE.read_text())
    times = [int(n.strip("*")) for n in re.findall(r"^\| [^|]+ \| (\**\d+\**) \|", held, re.M)]
    assert times[-1] == sum(times[:-1]) >= 300
    assert "**Runs lost: 0. Duplicated records or rows: 0. Differing bits: 0.**" in held


def test_the_readme_says_what_the_table_says() -> None:
    sums = next(line for line in block(PAGE.read_text()).splitlines() if line.startswith("| **all**"))
    times, mean = re.findall(r"\*\*([\d.]+)\*\*", sums)
    said = " ".join((ROOT / "README.md").read_text().split())
    assert f"Of {times} injected faults of fourteen kinds, none lost a run, duplicated a record or changed a bit" in said
    assert f"the average fault cost {mean} s." in said
