"""A grid says its size before it is planned, and a large one is confirmed."""

import argparse
import sys
from pathlib import Path

import pytest

from sweeps.cli.plan import confirm_grid


def asked(yes: bool = False, dry_run: bool = False) -> argparse.Namespace:
    return argparse.Namespace(yes=yes, dry_run=dry_run)


def test_a_grid_says_its_size_and_a_large_one_needs_a_yes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    confirm_grid(250, 2, tmp_path, asked())
    assert capsys.readouterr().out == "grid: 250 configurations, seeds of each: 2; 500 runs in all\n"
    with pytest.raises(ValueError, match=r"--sampler grid must have at most 500 runs, or be confirmed; got 1,320: add --yes"):
        confirm_grid(660, 2, tmp_path, asked())
    assert "1,320 runs in all" in capsys.readouterr().out, "before it is refused"
    confirm_grid(660, 2, tmp_path, asked(yes=True))
    confirm_grid(660, 2, tmp_path, asked(dry_run=True))
    (tmp_path / "sweep.json").touch()
    confirm_grid(660, 2, tmp_path, asked())  # the same command resumes it


@pytest.mark.parametrize("answer", ["y", "YES ", "n", ""])
def test_a_person_is_asked(answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _: answer)
    if answer.strip().lower() in ("y", "yes"):
        confirm_grid(501, 1, tmp_path, asked())
    else:
        with pytest.raises(ValueError, match="must have at most 500 runs"):
            confirm_grid(501, 1, tmp_path, asked())
