"""Another trainer than CNN-JEPA under the launcher: swept, killed and resumed, searched, shown; and a task that is none."""

import json
import pickle
import sys
from pathlib import Path

import pytest

from cnnjepa.run.folder import RunStatus, never
from cnnjepa.run.identity import from_dict, signature, to_dict
from jobs.config import compose_job
from jobs.task import task_of
from sweeps import __main__ as sweeps
from sweeps.execution.worker import run_worker
from sweeps.spec.space import choice, real
from sweeps.spec.sweep import ScaleName, SweepSpec, build_trials
from sweeps.state.claims import Process
from sweeps.state.folder import Sweep
from tests.support.killed_run import EXAMPLES, configured, killed_and_resumed, loaded, scores
from tests.support.scored import called, result_of
from tests.support.searched import searched

SUPPORT = Path(__file__).parents[1] / "support"


def reader(command: str, made: Sweep, *words: str) -> str:
    status, out, err = called(sweeps.main, command, made.path, *words)
    assert status == 0, out + err
    return out


@pytest.mark.slow
def test_a_sweep_of_another_trainer_is_killed_resumed_and_reported(tmp_path: Path) -> None:
    spec, _ = configured(loaded(EXAMPLES / "sklearn_digits.py").SWEEP)
    trials = build_trials(spec, spec.scale(ScaleName.smoke), 2, "local", ["epochs=4"])
    made = Sweep.of(spec, ScaleName.smoke, trials, tmp_path / "sklearn_digits-smoke")
    made.write()
    attempts = [killed_and_resumed(trial.config, made.trial_dir(trial), 2, seed)[1] for seed, trial in enumerate(made.trials)]
    assert sum(attempts) > len(attempts) == 4
    for trial in made.trials:
        assert [record["step"] for record in scores(made.trial_dir(trial)) if record["kind"] == "probe"] == [1, 2, 3, 4]
    assert json.loads(reader("status", made, "--json"))["counts"]["completed"] == 4
    assert "│ l1 " in reader("results", made)
    reader("report", made)
    page = (made.path / "report.html").read_text()
    assert "alpha 0.0001, epochs 4, penalty l1, task sklearn_digits:TASK: 2 runs" in page


@pytest.mark.slow
def test_another_trainer_is_searched_with_rungs(tmp_path: Path) -> None:
    space = [real("alpha", 1e-6, 10.0, 1e-4, log=True), choice("penalty", "l2", "l1")]
    spec, _ = configured(SweepSpec(space=space, task=loaded(EXAMPLES / "sklearn_digits.py").TASK))
    made = searched(tmp_path, rungs=[2], eta=2, spec=spec, max_trials=5)
    run_worker(made, compose_job(["cluster=local"]).cluster, Process.me().driver, never)
    results = [result_of(made.trial_dir(trial)) for trial in Sweep.load(made.path).trials]
    errors = {status: [r.probes["2"]["error"] for r in results if r.status is status] for status in (RunStatus.completed, RunStatus.pruned)}
    assert sum(map(len, errors.values())) == len(results) == 5
    assert min(errors[RunStatus.completed]) < min(errors[RunStatus.pruned])


@pytest.fixture
def _found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.syspath_prepend(SUPPORT)


@pytest.mark.usefixtures("_found")
def test_a_configuration_records_its_task_unless_it_is_the_default(tmp_path: Path) -> None:
    config = compose_job(["alpha=0.5"], "sklearn_digits:TASK").train
    assert to_dict(config) == {"alpha": 0.5, "penalty": "l2", "epochs": 6, "seed": 42, "task": "sklearn_digits:TASK"}
    assert from_dict(to_dict(config)) == config == pickle.loads(pickle.dumps(config))  # noqa: S301, our own bytes
    assert signature(compose_job(["task=site_task", "pause_seconds=9"]).train) == signature(compose_job([], "site_task").train)
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
    with pytest.raises(ValueError, match=r"^epochs must be at least 1; got -1$"):
        compose_job(["epochs=-1"], "sklearn_digits:TASK")
    with pytest.raises(ValueError, match=r"^penalyt must be a key of the configuration; got penalyt=l1; did you mean penalty\?$"):
        compose_job(["penalyt=l1"], "sklearn_digits:TASK")
    with pytest.raises(ValueError, match=r"^data must be a key of the configuration; "):
        compose_job(["data=digits"], "sklearn_digits:TASK")
