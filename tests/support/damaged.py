"""Finished sweeps whose files are changed by hand, and what the commands that read them say."""

import json
import os
import sys
from pathlib import Path

import pytest

from cnnjepa.run.files import SEAL
from sweeps import __main__ as readers
from sweeps.state import claims
from sweeps.state.folder import Sweep
from sweeps.state.view import View
from tests.support.reported import ALIKE, made

Capture = pytest.CaptureFixture[str]
READERS = (["status"], ["results", "--format", "csv"], ["results"], ["report"], ["advice"], ["study"], ["logs", "0", "--no-follow"])


def finished(path: Path) -> View:
    """A finished sweep of three configurations and two seeds, as a command reads it."""
    view = made(path, {name: scores[:2] for name, scores in ALIKE.items()}, seeds=2)
    for trial in view.sweep.trials:
        with claims.claim(view.sweep.trial_dir(trial), 1, "d", 0) or pytest.fail("taken"):
            pass
    return View(Sweep.load(view.sweep.path))


def said(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> tuple[int, str, str]:
    """Exit status, output and errors of `python -m sweeps`."""
    monkeypatch.setattr(sys, "argv", ["sweeps", *words])
    capsys.readouterr()
    status = readers.main()
    return status, *capsys.readouterr()


def changed(path: Path, **values: object) -> None:
    """Change values of a JSON file, as version 0.1 would have written it."""
    known = json.loads(path.read_text())
    known.pop(SEAL, None)
    path.write_text(json.dumps({**known, **values}))


def no_file(path: Path) -> None:
    path.unlink()
    path.mkdir()


def away(path: Path) -> None:
    """A link to a folder beside the sweep's, in the place of one within."""
    elsewhere = path.parents[3] / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    if path.exists():
        os.rename(path, path.with_name(f"{path.name}-was"))
    path.symlink_to(elsewhere)
