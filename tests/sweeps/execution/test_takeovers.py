"""Owners that are suspended, and wake up after another process has taken their trial over, change nothing of it."""

from pathlib import Path

import pytest

from tests.support.sample import seeded
from tests.support.takeovers import Found, campaign


def assert_nothing_is_lost(found: list[Found]) -> None:
    assert [vars(f) for f in found if not f.holds] == []
    assert all(f.attempts > 1 for f in found if f.suspended_at < 30), "another owner has taken over"


@pytest.mark.slow
@seeded
def test_two_takeovers_from_suspended_owners_lose_nothing(seed: str, tmp_path: Path) -> None:
    assert_nothing_is_lost(campaign(tmp_path, 2, seed))


@pytest.mark.nightly
def test_30_takeovers_from_suspended_owners_lose_nothing(tmp_path: Path) -> None:
    assert_nothing_is_lost(campaign(tmp_path, 30, "nightly"))
