"""The example of docs/guides/own-task.md is swept as it stands on the page, and the page names every part of a task."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs.task import Task
from tests.support import forked
from tests.support.documented import ROOT, code_spans, example, page, typed
from tests.support.killed_run import configured, loaded

PAGE = "own-task.md"


def in_bash(folder: Path, *commands: list[str]) -> str:
    """What the commands print, typed one after the other in `folder`; double quotes, since one names $PWD."""
    lines = ["set -e", *(" ".join(f'"{word}"' for word in words) for words in commands)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(["bash", "-c", "\n".join(lines)], cwd=folder, **pipes) as child:
        try:
            out, err = child.communicate(timeout=500)  # it took a minute on a busy machine, and once more than five
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)  # bash alone would leave behind what it started
            raise
    assert child.returncode == 0, out + err
    return out


def results(folder: Path, words: list[str]) -> str:
    """What `python -m sweeps results` prints there, without the seconds of Python's start."""
    done = forked.run(words[1:], cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_function_is_swept_as_it_stands_on_the_page(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "digits_rate.py").write_text(example(PAGE, "python"))
    python = {"python": sys.executable}
    path = ["export", f"PYTHONPATH={ROOT}"]
    in_bash(tmp_path, path, [*typed("python mine/digits_rate.py --cluster local --seeds 2", python), "max_parallel=2"])
    table = list(csv.DictReader((tmp_path / "runs" / "digits_rate-smoke" / "results.csv").open()))
    assert [row["state"] for row in table] == ["completed"] * 4
    assert all(float(row["accuracy"]) > 80 for row in table)
    # No path leads to the program: it is in the sweep's folder.
    (tmp_path / "mine" / "digits_rate.py").unlink()
    shown = results(tmp_path, typed("python -m sweeps results runs/digits_rate-smoke", python))
    assert "lr 0.1" in shown


def test_the_command_on_the_page_is_planned_as_it_stands_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.py").touch()
    (tmp_path / "on_the_page.py").write_text(example(PAGE, "python", 1))
    spec, config = configured(loaded(tmp_path / "on_the_page.py").SWEEP, "lr=0.5")
    assert spec.task_name == "on_the_page:SWEEP"
    assert (config.lr, config.epochs, config.seed) == (0.5, 6, 42)


@pytest.mark.slow
def test_the_example_is_swept_as_it_stands_on_the_page(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for number, name in enumerate(("softmax_task.py", "softmax_rate.py")):
        (tmp_path / "mine" / name).write_text(example(PAGE, "python", 2 + number))
    python = {"python": sys.executable}
    path = typed("export PYTHONPATH=$PWD/mine", {"PYTHONPATH=$PWD/mine": f"PYTHONPATH=$PWD/mine:{ROOT}"})
    in_bash(tmp_path, path, typed("python mine/softmax_rate.py --cluster local", python))
    folder = tmp_path / "runs" / "softmax_rate-smoke"
    table = list(csv.DictReader((folder / "results.csv").open()))
    assert [row["state"] for row in table] == ["completed"] * 6
    assert all(float(row["holdout_accuracy"]) > 80 for row in table if row["setting"] == "lr 1")
    shown = results(tmp_path, typed("python -m sweeps results runs/softmax_rate-smoke", python))
    assert "lr 0.1" in shown
    assert "holdout accuracy" in " ".join(shown.split())
    assert "completed: " in in_bash(tmp_path, path, typed("python -m jobs.pretrain task=softmax_task epochs=5", python))
    # A run that is continued from its first checkpoints ends with the same scores.
    [single] = (tmp_path / "runs" / "single").iterdir()
    whole = json.loads((single / "result.json").read_text())
    (single / "result.json").unlink()
    for later in sorted((single / "checkpoints").glob("step-*.pt"))[1:]:
        later.unlink()
    assert "completed: " in in_bash(tmp_path, path, [sys.executable, "-m", "jobs.pretrain", "task=softmax_task", "epochs=5"])
    again = json.loads((single / "result.json").read_text())
    assert (again["metrics"], again["probes"], again["step"]) == (whole["metrics"], whole["probes"], 5)


def test_the_page_names_every_part_that_a_task_may_define() -> None:
    helpers = {"name", "Config", "train", "value", "get", "put", "sign", "counted", "declares_metrics"}
    parts = {part for part in (*Task.__annotations__, *vars(Task)) if not part.startswith("_")} - helpers
    assert parts - set(code_spans(page(PAGE))) == set()
