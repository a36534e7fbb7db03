"""What the tests of staging share."""

from pathlib import Path

import pytest

from tests.support.staging import packed


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return packed(tmp_path / "set")


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"
