"""The table of faults in docs/how-it-works/fault-injection.md lists just the faults that are tested."""

import re
from pathlib import Path

from tests.faults_table import PAGE, block, faults_in
from tests.support.documented import ROOT

TESTS = Path(__file__).parent / "sweeps" / "execution" / "test_slurm_faults.py"


def test_the_table_lists_the_faults_that_are_tested() -> None:
    listed = faults_in(PAGE.read_text())
    source = TESTS.read_text()
    names = re.findall(r'faults\.line\(f?"([^"]+)"', source) + re.findall(r'\(\w+, \d+, "([^"]+)"\)', source)
    patterns = [re.compile(re.sub(r"\\{\w+\\}", r"\\w+", re.escape(n))) for n in names]
    assert len(names) > 10
    assert [n for n, p in zip(names, patterns) if not any(p.fullmatch(fault) for fault in listed)] == []
    assert [fault for fault in listed if not any(p.fullmatch(fault) for p in patterns)] == []


def test_the_readme_says_what_the_table_says() -> None:
    page = PAGE.read_text()
    lost = max(map(float, re.findall(r"\| ([\d.]+) \|$", block(page), re.M)))
    assert len(faults_in(page)) == 14
    said = " ".join((ROOT / "README.md").read_text().split())
    assert (
        f"In 14 fault scenarios on a real Slurm, trials that save at almost every step lost at most {lost:.1f} s of training each." in said
    )
