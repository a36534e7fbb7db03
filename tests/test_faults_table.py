"""The table of faults in docs/resuming.md lists just the faults that are tested."""

import re
from pathlib import Path

from tests.faults_table import PAGE, faults_in

TESTS = Path(__file__).parent / "sweeps" / "test_slurm_faults.py"


def test_the_table_lists_the_faults_that_are_tested() -> None:
    listed = faults_in(PAGE.read_text())
    source = TESTS.read_text()
    names = re.findall(r'faults\.line\(f?"([^"]+)"', source) + re.findall(r'\(\w+, \d+, "([^"]+)"\)', source)
    patterns = [re.compile(re.sub(r"\\{\w+\\}", r"\\w+", re.escape(n))) for n in names]
    assert len(names) > 10
    assert [n for n, p in zip(names, patterns) if not any(p.fullmatch(fault) for fault in listed)] == []
    assert [fault for fault in listed if not any(p.fullmatch(fault) for p in patterns)] == []
