"""The Python API: its page runs as it stands, in a thread and without a __main__ file, and a frame has every key and metric."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cnnjepa.run import checkpoint
from cnnjepa.run.folder import RunStatus
from jobs.task import Task
from sweeps import Sweep, plan, run
from sweeps.cli import api
from sweeps.report import aggregate
from sweeps.state.view import View
from tests.support.documented import ROOT, blocks, page
from tests.support.reported import CLEAR, LINEAR, OBJECTIVE, failed, made
from tests.support.tiny_sweep import sweep as tiny

# Types the cells of the page into a namespace as a notebook does, in a thread of a process that has no file.
_NOTEBOOK = """
import json, os, signal, subprocess, sys, threading
own = subprocess.Popen(["sleep", "600"])
cells, shown = json.loads(sys.stdin.read()), {"__name__": "__main__"}
numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
before, environment, failed = [signal.getsignal(n) for n in numbers], dict(os.environ), []
def go():
    for number, cell in enumerate(cells):
        exec(compile(cell, f"<cell {number}>", "exec"), shown)
    failed.append(None)
thread = threading.Thread(target=go)
thread.start()
thread.join()
own_lives = own.poll() is None
own.kill()
assert failed == [None], "a cell failed"
assert [signal.getsignal(n) for n in numbers] == before
assert dict(os.environ) == environment
assert own_lives, "a process of the caller's was ended with Ray"
frame = shown["frame"]
shape = list(shown["features"].shape)
print("RESULT", json.dumps({"rows": len(frame), "states": sorted(set(frame.state)), "shape": shape}))
"""


@pytest.mark.slow
def test_the_page_runs_as_it_stands_in_a_thread_of_a_process_without_a_file(tmp_path: Path) -> None:
    cells = ["\n".join(b.lines) for b in blocks(page("python-api.md")) if b.language == "python"]
    assert len(cells) == 7
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", _NOTEBOOK]
    done = subprocess.run(
        words, cwd=tmp_path, env=environment, input=json.dumps(cells), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    found = json.loads(line.removeprefix("RESULT"))
    assert (found["rows"], found["states"], found["shape"][0]) == (4, ["completed"], 2)
    (folder,) = (tmp_path / "runs").glob("which_rate-smoke-*")  # named after the page's overrides
    commands = [json.loads(text) for text in (folder / "commands.jsonl").read_text().splitlines()]
    assert commands[0]["command"][0] == "run(which_rate)"


def test_a_frame_has_a_column_for_each_key_and_metric(tmp_path: Path) -> None:
    view = made(tmp_path / "s", CLEAR)
    view.sweep.run(view.sweep.trials[0]).set_aside(RunStatus.completed)
    failed(view, 0, "it broke")
    frame = Sweep.open(tmp_path / "s").to_frame()
    assert len(frame) == len(view.sweep.trials)
    assert {"run_id", "configuration", "seed", "state", "cause", "optimizer.lr", "method.predictor.depth", "data.name", "epochs"} < set(
        frame
    )
    assert list(frame.columns[:5]) == ["run_id", "configuration", "seed", "state", "cause"]
    assert frame.columns.is_unique
    assert (frame.state[0], frame.cause[0]) == ("failed", "it broke")
    assert math.isnan(frame[OBJECTIVE][0])
    depth_2 = frame[frame.configuration == "depth 2"]
    assert set(depth_2["method.predictor.depth"]) == {2}
    assert depth_2[LINEAR].tolist() == [74.2, 75.0, 74.4]


def test_names_that_are_taken_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path / "s", CLEAR)
    opened = Sweep.open(tmp_path / "s")
    trial = opened.trials[0]
    twisted = api.Trial(
        **{**vars(trial), "metrics": {"epochs": 1.0, OBJECTIVE: 2.0, "seconds": 3.0}, "costs": {"seconds": 4.0, "seed": 5.0}}
    )
    monkeypatch.setattr(api.Sweep, "trials", [twisted])
    frame = opened.to_frame()
    assert frame.columns.is_unique
    row = frame.iloc[0]
    assert (row["metric.epochs"], row["seconds"], row["cost.seconds"], row["cost.seed"]) == (1.0, 3.0, 4.0, 5.0)


def test_the_best_has_its_trials_best_first(tmp_path: Path) -> None:
    made(tmp_path / "s", CLEAR)
    best = Sweep.open(tmp_path / "s").best()
    assert best is not None
    assert (best.configuration, best.metric, best.significant) == ("depth 2", OBJECTIVE, True)
    assert [t.metrics[OBJECTIVE] for t in best.trials] == [76.0, 75.4, 75.2]
    assert best.trial.seed == 43
    assert best.hyperparameters["method.predictor.depth"] == 2
    assert "seed" not in best.hyperparameters
    assert list(best.trial.history().step) == [1, 2, 3]
    with pytest.raises(ValueError, match=r"must hold an intact checkpoint; got .*, whose trial is completed"):
        best.trial.checkpoint()


def test_the_best_is_found_in_one_look_at_the_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path / "s", CLEAR)
    opened, looks, tables = Sweep.open(tmp_path / "s"), [0], [0]
    rows, look = aggregate.rows, View.look_again

    def counted(view: View) -> list[aggregate.Row]:
        tables[0] += 1
        return rows(view)

    def looked(view: View) -> None:
        looks[0] += 1
        look(view)

    monkeypatch.setattr(aggregate, "rows", counted)
    monkeypatch.setattr(View, "look_again", looked)
    assert opened.best() is not None
    assert (looks, tables) == ([1], [1])


def test_the_best_of_a_minimized_objective_is_the_lowest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path / "s", CLEAR)
    monkeypatch.setattr(Task, "MINIMIZED", (OBJECTIVE,))
    best = Sweep.open(tmp_path / "s").best()
    assert best is not None
    scores = [t.metrics[OBJECTIVE] for t in best.trials]
    assert (best.configuration, scores) == ("depth 1", sorted(scores))


def test_an_encoder_has_the_weights_of_its_checkpoint(tmp_path: Path) -> None:
    import torch

    from cnnjepa.config import method_module
    from jobs.task import task_of

    view = made(tmp_path / "s", {"depth 2": [1.0]})
    trial = next(t for t in Sweep.open(tmp_path / "s").trials if t.state == "completed")
    torch.manual_seed(5)
    method = method_module("cnn_jepa").Method(trial.config, total_steps=1)
    checkpoint.save(trial.folder / "checkpoints", 3, {"method": method.state_dict()}, keep=1)
    network = trial.encoder()
    assert not network.training
    there, here = method.probe_encoder.state_dict(), network.state_dict()
    assert there.keys() == here.keys()
    assert all(torch.equal(there[name], here[name]) for name in there)
    with pytest.raises(ValueError, match="task must define encoder"):
        type(task_of(trial.config)).encoder(task_of(trial.config), trial.config, {})
    assert view.sweep.path == tmp_path / "s"


def test_planning_writes_nothing_and_a_mistake_is_the_line_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    planned = plan(tiny(), "epochs=3", seeds=1)
    assert {t.hyperparameters["epochs"] for t in planned.trials} == {3}
    assert {t.state for t in planned.trials} == {"waiting"}
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="--sedes must be an option listed by --help"):
        plan(tiny(), sedes=1)
    with pytest.raises(ValueError, match="epocs must be a key of the configuration"):
        run(tiny(), "epocs=3")
    assert planned.best() is None


def test_waiting_has_an_end(tmp_path: Path) -> None:
    made(tmp_path / "s", {"depth 2": [1.0]})
    opened = Sweep.open(tmp_path / "s")
    assert not opened.has_ended
    with pytest.raises(TimeoutError, match=r"has not ended within 0\.1 s: python -m sweeps status"):
        opened.wait(0.1)
    assert next(opened.watch())["counts"]["completed"] == 1
    made(tmp_path / "whole", CLEAR)
    whole = Sweep.open(tmp_path / "whole").wait(1)
    assert [status["counts"]["completed"] for status in whole.watch()] == [len(whole.trials)]


def test_a_ray_of_the_callers_is_refused_and_the_environment_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = type(sys)("ray")
    ray.is_initialized = lambda: True
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"Ray must be free in this process.*call ray\.shutdown\(\) first"):
        run(tiny(), seeds=1)
    ray.is_initialized = lambda: False
    handler = signal.getsignal(signal.SIGINT)

    def interrupted(*_: object, **options: object) -> int:
        os.environ["RAY_AUTH_MODE"] = "token"
        raise KeyboardInterrupt

    monkeypatch.setattr(api.command, "run", interrupted)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with pytest.raises(KeyboardInterrupt):
        run(tiny(), seeds=1)
    assert "RAY_AUTH_MODE" not in os.environ
    assert signal.getsignal(signal.SIGINT) is handler
