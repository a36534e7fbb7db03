"""Hostile content of a sweep folder: no command leaves the folder, and no terminal or spreadsheet obeys what a file holds."""

import json
import os
import sys
from pathlib import Path

import pytest

from cnnjepa.run.files import DamagedError
from cnnjepa.run.folder import RunFolder, RunResult, RunStatus
from jobs import probe
from sweeps.report import tables
from sweeps.state.trial_state import TrialState
from sweeps.state.view import View
from tests.support.damaged import READERS, Capture, changed, finished, said


@pytest.fixture
def view(tmp_path: Path) -> View:
    return finished(tmp_path / "s")


@pytest.mark.parametrize("name", ["../elsewhere", "/tmp/x", "..", "a/b", "", ".hidden", "a\nb", "\x1b[2J"])
def test_a_run_id_that_leaves_the_folder_is_refused(name: str, view: View, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    path = view.sweep.path / "sweep.json"
    values = json.loads(path.read_text())
    values["trials"][0]["signature"] = name
    changed(path, trials=values["trials"])
    for words in (*READERS, ["cancel"]):
        status, _, err = said([words[0], str(view.sweep.path), *words[1:]], monkeypatch, capsys)
        assert status == 2, words
        assert "signature must be letters, digits" in err
        assert err.removesuffix("\n").isprintable()


@pytest.mark.parametrize("name", ["trial", "claim", "checkpoints", "scores", "result.json"])
def test_no_command_writes_through_a_link_that_leads_away(
    name: str, view: View, monkeypatch: pytest.MonkeyPatch, capsys: Capture, tmp_path: Path
) -> None:
    folder = view.sweep.trial_dir(view.sweep.trials[0])
    away_to = tmp_path / "away"
    inside = folder if name == "trial" else folder / name
    if inside.exists():
        os.rename(inside, away_to)
    else:
        away_to.mkdir()
    inside.symlink_to(away_to)
    before = sorted((p.name, p.stat().st_mtime_ns) for p in [away_to, *away_to.rglob("*")])
    assert said(["cancel", str(view.sweep.path)], monkeypatch, capsys)[0] == 0
    monkeypatch.setattr(sys, "argv", ["probe", str(view.sweep.path)])
    assert probe.main() == 2
    assert "must stay within" in capsys.readouterr().err
    assert sorted((p.name, p.stat().st_mtime_ns) for p in [away_to, *away_to.rglob("*")]) == before
    with pytest.raises(DamagedError, match="must stay within"):
        RunFolder(folder).check(None)


def test_a_link_within_the_sweep_is_none_of_that(view: View) -> None:
    folder = view.sweep.trial_dir(view.sweep.trials[0])
    (view.sweep.path / "disk2").mkdir()
    (folder / "checkpoints").symlink_to(view.sweep.path / "disk2")
    assert View(view.sweep).state(view.sweep.trials[0]) is TrialState.completed


def test_a_request_for_scores_names_only_runs_of_its_sweep(view: View, tmp_path: Path) -> None:
    file = view.sweep.path / "scores" / "request-1.json"
    file.parent.mkdir()
    own_run = view.sweep.trial_dir(view.sweep.trials[0])
    request = probe.Request([own_run], {"a": 1}, 1, "cpu", "")
    request.write(file)
    assert probe.Request.load(file) == request
    probe.Request([own_run, tmp_path / "other"], {}, 1, "cpu", "").write(file)
    with pytest.raises(DamagedError, match="runs must be within"):
        probe.Request.load(file)
    changed(file, runs="abc")
    with pytest.raises(DamagedError, match="runs must be of type"):
        probe.Request.load(file)


HOSTILE = "OSError: \x1b]0;pwned\x07 \x1b[2J \x9b31m \u202egnp.exe"


def test_control_characters_of_a_folder_reach_no_terminal(view: View, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    sweep = view.sweep
    trial = sweep.trials[0]
    run = sweep.run(trial)
    (run.path / "result.json").unlink()
    run.write_result(RunResult(RunStatus.failed, HOSTILE, missing={"knn": HOSTILE}))
    (run.logs / "train.log").write_text(f"step 1\r{HOSTILE}\n")
    values = json.loads((sweep.path / "sweep.json").read_text())
    values["trials"][0]["setting"] = f"depth \x1b[2J{values['trials'][0]['setting']}"
    changed(sweep.path / "sweep.json", trials=values["trials"], question=HOSTILE, name="x\x1b[2J")
    for words in (*READERS, ["cancel"], ["results", "--format", "markdown"], ["results", "--format", "latex"]):
        status, out, err = said([words[0], str(sweep.path), *words[1:]], monkeypatch, capsys)
        assert (status, err) == (0, ""), words
        assert [c for c in out if not c.isprintable() and c not in "\n\t"] == [], words
        if words[0] in ("status", "logs"):
            assert "\\x1b]0;pwned\\x07" in out.replace("\n", "")
    written = (sweep.path / "results.csv").read_text()
    assert [c for c in written if not c.isprintable() and c != "\n"] == []


def test_cells_that_a_spreadsheet_would_run_begin_with_a_quote(view: View) -> None:
    """OWASP's remedy; a number stays one."""
    cells = ["=cmd|' /C calc'!A0", "+1+2", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "-5.25e-3", "+7", "-", "a=b", "", None, -3.5, 7]
    found = [tables.csv_cell(cell) for cell in cells]
    assert found[:4] == ["'=cmd|' /C calc'!A0", "'+1+2", "'-2+3", "'@SUM(A1)"]
    assert found[4:6] == ["'\\t=1", "'\\r=1"]
    assert found[6:] == ["-5.25e-3", "+7", "'-", "a=b", "", "", -3.5, 7]
    run = view.sweep.run(view.sweep.trials[0])
    (run.path / "result.json").unlink()
    run.write_result(RunResult(RunStatus.failed, "=HYPERLINK(1)"))
    assert ",'=HYPERLINK(1)\n" in tables.results_csv(View(view.sweep))
