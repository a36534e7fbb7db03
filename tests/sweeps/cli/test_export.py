"""The command line of `python -m sweeps export`: what it refuses, in one line and before anything is written."""

import sys
from pathlib import Path

import pytest

from sweeps import __main__ as command_line
from sweeps.cli import export
from tests.support import exported


def refused(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    monkeypatch.setattr(sys, "argv", ["sweeps", "export", str(folder), *words])
    assert command_line.main() == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert not (folder / "results.csv").exists()
    return said.err


@pytest.mark.parametrize("tracker", export.TRACKERS)
def test_a_missing_library_is_one_line_with_the_command_that_installs_it(
    tracker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exported.swept(tmp_path / "some-paper")
    monkeypatch.setitem(sys.modules, tracker, None)  # what import finds where nothing is installed
    line = refused(tmp_path / "some-paper", monkeypatch, capsys, "--to", tracker)
    assert (
        line == f"error: --to {tracker} must find the library {tracker}; got none: in a clone of this project, pip install '.[{tracker}]'\n"
    )


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--to", "wandb", "--experiment", "x"], "--experiment must come with --to mlflow; got --to wandb: leave it out"),
        (["--to", "mlflow", "--offline"], "--offline must come with --to wandb; got --to mlflow: leave it out"),
        (["--to", "neptune"], "--to must be one of mlflow, wandb; got neptune"),
        ([], "the command line must match --help; got the following arguments are required: --to"),
    ],
)
def test_options_that_do_not_belong_together_are_refused(
    words: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exported.swept(tmp_path / "some-paper")
    assert refused(tmp_path / "some-paper", monkeypatch, capsys, *words) == f"error: {line}\n"


def test_a_mode_of_wandb_that_sends_nothing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exported.swept(tmp_path / "some-paper")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr(export, "require_library", lambda tracker: None)
    line = refused(tmp_path / "some-paper", monkeypatch, capsys, "--to", "wandb")
    assert line == "error: WANDB_MODE must be online or offline to export; got disabled: unset it\n"
