"""Run a task in this process, attempt by attempt, as if each but the last were killed; and load the examples of docs/examples/."""

import importlib.util
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cnnjepa.run import checkpoint, progress
from cnnjepa.run.folder import RunFolder, RunResult, never, no_judge
from jobs.config import compose_job
from jobs.plain_run import Run
from jobs.task import task_named
from sweeps.spec.sweep import SweepSpec
from sweeps.state.claims import claim

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"


class KilledError(BaseException):
    """The end of an attempt that runs nothing more, as after SIGKILL."""


def loaded(file: Path) -> ModuleType:
    """The module in a file, under the name of the file."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def configured(sweep: SweepSpec, *overrides: str) -> tuple[SweepSpec, Any]:
    """A sweep whose task has a name, and a configuration of it."""
    named = sweep.resolved("some_sweep")
    return named, compose_job(list(overrides), named.task_name).train


def attempt(config: Any, path: Path, number: int, stop: Callable[[], bool] = never, judge: Any = no_judge) -> RunResult | None:
    """What an attempt at a run returns, under a claim of its own as in a sweep."""
    folder = RunFolder(path, number)
    folder.prepare(config)
    found = checkpoint.find(folder.checkpoints)
    assert claim(path, number, "driver", found[0].step if found else progress.read(path).step) is not None
    return task_named(config.task).train(config, folder, stop, number, judge)


def kill_at(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    """Kill the attempt at the so many-th call of report or save, before or after it."""
    left = [calls]

    def dying(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(run: Run, *words: Any, **more: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                raise KilledError
            result = method(run, *words, **more)
            left[0] -= 1
            if left[0] == 0:
                raise KilledError
            return result

        return call

    monkeypatch.setattr(Run, "report", dying(Run.report))
    monkeypatch.setattr(Run, "save", dying(Run.save))


def killed_and_resumed(config: Any, path: Path, kills: int, seed: int) -> tuple[RunResult, int]:
    """The result of a run that was killed so often at drawn moments, and how many attempts it took."""
    draw = random.Random(seed)
    for number in range(1, kills + 1):
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, draw.randint(1, 9))
            try:
                if (early := attempt(config, path, number)) is not None:
                    return early, number
            except KilledError:
                pass
    result = attempt(config, path, kills + 1)
    assert result is not None
    return result, kills + 1


def scores(path: Path) -> list[dict[str, Any]]:
    """The records of a run."""
    return RunFolder(path).metrics()
