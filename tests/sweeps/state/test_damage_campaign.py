"""A sample of the damages of tests/benchmarks/damage.py: no traceback, no endless loop, no table that differs silently."""

from pathlib import Path

import pytest

from tests.support import damage
from tests.support.sample import seeded


@pytest.mark.slow
@seeded
def test_a_damage_costs_no_more_than_its_trial(seed: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    damage.prepare(monkeypatch)
    bases = damage.bases(tmp_path / "bases")
    (tmp_path / "work").mkdir()
    found = [damage.judged(one, bases[one.sweep], tmp_path / "work") for one in damage.drawn(bases, 5, int(seed))]
    assert [(str(one.damage), one.what, fault) for one in found for fault in one.faults] == []
    assert any(one.named for one in found)
