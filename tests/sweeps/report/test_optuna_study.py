"""The mirror of a sweep as an Optuna study."""

import json
import shlex
import subprocess
import sys
import threading
import urllib.request
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

import optuna
import pytest

from cnnjepa.run.folder import RunStatus
from sweeps.execution.scheduler import next_claim
from sweeps.report import optuna_study
from sweeps.state.claims import Process
from sweeps.state.view import View
from tests.support.documented import typed
from tests.support.searched import State, end, run_to_the_end, searched

ROOT = Path(__file__).parents[3]


def test_the_mirror_tells_optuna_of_every_run_and_nothing_without_value_has_one(tmp_path: Path) -> None:
    made = searched(tmp_path, [2], max_trials=6)
    view = View(made)
    outcomes = [(60.0, RunStatus.completed), (None, RunStatus.pruned), (None, RunStatus.failed), (None, RunStatus.completed)]
    for score, status in outcomes:
        got = next_claim(view, "d")
        assert got is not None
        with got[1]:
            end(made, got[0], score, status, e2=50.0)
    assert next_claim(view, Process.me().driver) is not None
    path = optuna_study.mirror(View(made))
    assert [p.name for p in made.path.iterdir() if "journal" in p.name] == ["optuna.journal"]
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
    read = optuna.load_study(study_name="tiny_search-smoke", storage=storage)
    assert [t.state for t in read.trials] == [State.COMPLETE, State.PRUNED, State.FAIL, State.FAIL, State.RUNNING]
    assert [t.value for t in read.trials] == [60.0, None, None, None, None]
    assert read.trials[1].intermediate_values == {2: 50.0}
    assert [t.params for t in read.trials] == [t.params for t in made.trials]
    assert read.best_trial.user_attrs["setting"] == made.trials[0].label
    assert optuna_study.mirror(View(made)) == path  # replaced, not added to
    assert len(optuna.load_study(study_name="tiny_search-smoke", storage=storage).trials) == 5


def test_optuna_dashboard_opens_the_mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program reads its own command line; only its server is put on a port that is free."""
    made = searched(tmp_path, max_trials=5)
    run_to_the_end(made, lambda t: float(t.number))
    line = [sys.executable, "-m", "sweeps", "study", str(made.path)]
    said = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout
    journal = str(made.path / "optuna.journal")
    words = typed("optuna-dashboard runs/joint_search-smoke/optuna.journal", {"runs/joint_search-smoke/optuna.journal": journal})
    assert shlex.split(said) == words
    (program,) = entry_points(group="console_scripts", name=words[0])
    apps: list[Any] = []
    monkeypatch.setattr(sys, "argv", [*words, "--server", "wsgiref"])
    monkeypatch.setitem(program.load().__globals__, "run_wsgiref", lambda app, *_: apps.append(app))
    program.load()()
    with make_server("127.0.0.1", 0, apps[0], handler_class=Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        root = f"http://127.0.0.1:{server.server_port}"
        page = urllib.request.urlopen(f"{root}/dashboard", timeout=30).read().decode()
        shown = json.load(urllib.request.urlopen(f"{root}/api/studies", timeout=30))["study_summaries"]
        trials = json.load(urllib.request.urlopen(f"{root}/api/studies/{shown[0]['study_id']}", timeout=30))["trials"]
        server.shutdown()
    assert "Optuna Dashboard" in page
    assert [s["study_name"] for s in shown] == ["tiny_search-smoke"]
    assert [t["values"][0] for t in trials] == [0.0, 1.0, 2.0, 3.0, 4.0]


class Quiet(WSGIRequestHandler):
    def log_message(self, *_: object) -> None:
        pass
