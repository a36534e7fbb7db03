"""Another trainer than CNN-JEPA under the launcher: swept, killed and resumed, searched, shown; and a task that is none."""

import csv
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cnnjepa.run.identity import from_dict, signature, to_dict
from jobs.config import compose_job
from jobs.task import task_of

ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "tests" / "support"
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}:{SUPPORT}"}


def command(script: str, runs: Path, *words: str) -> list[str]:
    return [sys.executable, str(SUPPORT / script), "--runs-dir", str(runs), "max_parallel=2", *words]


def called(line: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(line, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=120)


def reader(*words: str) -> str:
    done = called([sys.executable, "-m", "sweeps", *words])
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_sweep_of_another_trainer_is_killed_resumed_and_reported(tmp_path: Path) -> None:
    line = command("softmax_sweep.py", tmp_path, "pause_seconds=0.3")
    child = subprocess.Popen(line, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 60
    while not any(p.stat().st_size > 300 for p in tmp_path.rglob("metrics.jsonl")):
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    done = called(line)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "softmax-smoke"
    table = list(csv.DictReader((folder / "results.csv").open()))
    assert [row["state"] for row in table] == ["completed"] * 4
    assert min(float(row["holdout_accuracy"]) for row in table if row["setting"] == "lr 0.1") > 85
    logs = [p.read_text() for p in folder.glob("trials/*/log/train.log")]
    assert any(log.count("begins after epoch") > 1 and "begins after epoch 0" not in log.split("\n", 1)[1] for log in logs)
    assert "lr 0.1" in reader("results", str(folder))
    assert json.loads(reader("status", str(folder), "--json"))["counts"]["completed"] == 4
    reader("report", str(folder))
    page = (folder / "report.html").read_text()
    assert "% holdout accuracy" in page
    assert "decay 0.0, epochs 6, lr 0.1, pause_seconds 0.3, task softmax_task: 2 runs" in page


@pytest.mark.slow
def test_another_trainer_is_searched_with_rungs(tmp_path: Path) -> None:
    done = called(command("softmax_search.py", tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "softmax_search-smoke"
    states = json.loads(reader("status", str(folder), "--json"))["counts"]
    assert states["completed"] + states["pruned"] == 5
    assert states["pruned"] >= 1


@pytest.fixture
def _found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SUPPORT)


@pytest.mark.usefixtures("_found")
def test_a_configuration_records_its_task_unless_it_is_the_default(tmp_path: Path) -> None:
    config = compose_job(["lr=0.5"], "softmax_task").train
    assert to_dict(config) == {"lr": 0.5, "decay": 0.0, "epochs": 6, "seed": 42, "pause_seconds": 0.0, "task": "softmax_task"}
    assert from_dict(to_dict(config)) == config == pickle.loads(pickle.dumps(config))  # noqa: S301, our own bytes
    assert signature(compose_job(["task=softmax_task", "pause_seconds=9"]).train) == signature(compose_job([], "softmax_task").train)
    default = compose_job([]).train
    assert "task" not in to_dict(default)
    assert task_of(default) is task_of(to_dict(default)) is not task_of(config)


_CLASS = "import dataclasses\n@dataclasses.dataclass\nclass Config:\n    seed: int = 1"


@pytest.mark.usefixtures("_found")
@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, r"task must be a module that can be imported; got some_task: ModuleNotFoundError: .*: add its folder to PYTHONPATH$"),
        ("1 / 0", r"task must be a module that can be imported; got some_task: ZeroDivisionError: "),
        ("Config = 3", r"task must be a module with .*; got some_task .* without a dataclass Config$"),
        (_CLASS, r" without Config\.epochs$"),
        (
            f"{_CLASS}\n    epochs: int = 1",
            r" without a function train$",
        ),
    ],
)
def test_a_task_that_is_none_is_one_clear_line(text: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "some_task", raising=False)
    if text is not None:
        (tmp_path / "some_task.py").write_text(text)
    with pytest.raises(ValueError, match=said) as raised:
        compose_job(["task=some_task"])
    assert "\n" not in str(raised.value)


@pytest.mark.usefixtures("_found")
def test_a_broken_rule_or_key_of_another_task_is_one_clear_line() -> None:
    with pytest.raises(ValueError, match=r"^lr must be positive; got -1\.0$"):
        compose_job(["lr=-1"], "softmax_task")
    with pytest.raises(ValueError, match=r"^decya must be a key of the configuration; got decya=1; did you mean decay\?$"):
        compose_job(["decya=1"], "softmax_task")
    with pytest.raises(ValueError, match=r"^data must be a key of the configuration; "):
        compose_job(["data=digits"], "softmax_task")
