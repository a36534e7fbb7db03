"""A dataclass and a function as a task: killed and resumed, stopped, pruned, and refused where it is none."""

import dataclasses
import itertools
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from cnnjepa.run import checkpoint, progress
from cnnjepa.run.folder import RunError, RunFolder, RunStatus, never, no_judge
from cnnjepa.run.identity import identity, signature
from jobs.config import compose_job
from jobs.plain import PlainTask
from jobs.plain_run import Run
from jobs.task import task_named
from sweeps.spec.sweep import Configuration, SweepSpec
from tests.support.killed_run import EXAMPLES, attempt, configured, killed_and_resumed, loaded, scores


@pytest.fixture(scope="module", params=["pytorch_digits", "sklearn_digits"])
def example(request: pytest.FixtureRequest) -> ModuleType:
    return loaded(EXAMPLES / f"{request.param}.py")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_a_run_that_is_killed_at_drawn_moments_ends_like_an_undisturbed_one(example: ModuleType, seed: int, tmp_path: Path) -> None:
    _, config = configured(example.SWEEP, "epochs=5")
    whole = attempt(config, tmp_path / "whole", 1)
    assert whole is not None
    again, _ = killed_and_resumed(config, tmp_path / "killed", 3, seed)
    assert (again.status, again.metrics, again.probes) == (whole.status, whole.metrics, whole.probes)
    assert scores(tmp_path / "killed") == scores(tmp_path / "whole")
    assert len(whole.probes) == 5
    first, other = (checkpoint.find(tmp_path / name / "checkpoints")[0] for name in ("whole", "killed"))
    if example.__name__ == "pytorch_digits":
        states = [checkpoint.read(found, torch.device("cpu"))["state"]["model"] for found in (first, other)]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@dataclasses.dataclass
class Config:
    lr: float = 0.1
    epochs: int = 6
    seed: int = 42


_done: list[int] = []


def train(config: Config, run: Run) -> None:
    total = run.restore() or 0.0
    for epoch in run.epochs():
        _done.append(epoch)
        total += epoch * config.lr
        run.report(epoch, loss=1 / total, seen=float(epoch))
        run.save(total)


TASK = PlainTask(Config, train, objective="loss", direction="minimize", unit="nats", headline=["seen"])
SWEEP = SweepSpec(configurations=[Configuration({"lr": 0.1})], task=TASK)


@pytest.fixture
def config() -> Any:
    _done.clear()
    return configured(SWEEP)[1]


def test_a_stop_saves_and_the_next_attempt_goes_on_from_there(config: Any, tmp_path: Path) -> None:
    asked = iter([False, False, False, True])
    assert attempt(config, tmp_path, 1, stop=lambda: next(asked, True)) is None
    reached = _done[-1]
    assert 0 < reached < 6
    result = attempt(config, tmp_path, 2)
    assert result is not None
    assert _done == [1, 2, 3, 4, 5, 6]
    assert (result.status, result.step, result.claim, result.resumes) == (RunStatus.completed, 6, 2, 1)
    assert result.seconds >= progress.read(tmp_path, 1).seconds > 0
    assert task_named(config.task).train(config, RunFolder(tmp_path, 2), never, 2, no_judge) == result  # nothing is trained twice
    assert len(_done) == 6


def test_a_stop_at_the_end_is_no_stop(config: Any, tmp_path: Path) -> None:
    result = attempt(config, tmp_path, 1, stop=lambda: len(_done) == 6)
    assert result is not None
    assert result.status is RunStatus.completed


def test_an_exit_is_a_stop_where_one_was_asked_for_and_else_the_end_of_the_process(tmp_path: Path) -> None:
    asked: list[int] = []

    def leaves(config: Config, run: Run) -> None:
        run.report(1, loss=0.0)
        raise SystemExit

    config = _swept(leaves)
    with pytest.raises(SystemExit):
        attempt(config, tmp_path, 1)
    assert RunFolder(tmp_path).result() is None

    def noticed_late() -> bool:
        asked.append(1)
        return len(asked) > 3

    assert attempt(config, tmp_path, 2, stop=noticed_late) is None
    assert RunFolder(tmp_path).result() is None


def test_a_run_is_pruned_where_the_judge_says_so_and_again_if_it_was_killed_then(config: Any, tmp_path: Path) -> None:
    def judge(epoch: int, metrics: dict[str, float]) -> str:
        return f"not among the best at {epoch}: {metrics['seen']:g}" if epoch >= 2 else ""

    for folder in (tmp_path / "a", tmp_path / "b"):
        _done.clear()
        result = attempt(config, folder, 1, judge=judge)
        assert result is not None
        assert (result.status, result.cause, result.metrics) == (RunStatus.pruned, "not among the best at 2: 2", {})
        assert _done == [1, 2]
    (tmp_path / "b" / "result.json").unlink()  # as if it had been killed before the result
    again = attempt(config, tmp_path / "b", 2, judge=judge)
    assert again is not None
    assert (again.status, again.cause) == (RunStatus.pruned, "not among the best at 2: 2")
    assert _done == [1, 2]


def test_a_damaged_checkpoint_costs_an_epoch_and_no_record(config: Any, tmp_path: Path) -> None:
    assert attempt(config, tmp_path, 1, stop=lambda: len(_done) == 4) is None
    newest = checkpoint.find(tmp_path / "checkpoints")[0]
    newest.path.write_bytes(newest.path.read_bytes()[:-9])
    result = attempt(config, tmp_path, 2)
    assert result is not None
    assert _done == [1, 2, 3, 4, 4, 5, 6]
    assert [r["epoch"] for r in scores(tmp_path) if r["kind"] == "probe"] == [1, 2, 3, 4, 5, 6]


_number = itertools.count()


def _swept(train: Any, kind: Any = Config, **more: Any) -> Any:
    """A configuration of a task that this module holds, under a name of its own."""
    name = f"TASK_{next(_number)}"
    globals()[name] = PlainTask(kind, train, objective="loss", **more)
    return configured(SweepSpec(task=globals()[name]))[1]


def test_a_run_that_saves_elsewhere_is_seen_to_gain_and_keeps_the_records_before_the_first_that_it_repeats(tmp_path: Path) -> None:
    def saves_nothing(config: Config, run: Run) -> None:
        begun = int((run.folder / "own").read_text()) if (run.folder / "own").exists() else 0
        for epoch in range(begun + 1, config.epochs + 1):
            if not run.report(epoch, loss=epoch / run.attempt):
                return
            (run.folder / "own").write_text(str(epoch - epoch % 2))  # it saves every second epoch

    config = _swept(saves_nothing)
    assert attempt(config, tmp_path, 1, stop=lambda: progress.read(tmp_path).step == 5) is None
    assert progress.read(tmp_path).step == 5
    result = attempt(config, tmp_path, 2)
    assert result is not None
    assert [r["loss"] for r in scores(tmp_path) if r["kind"] == "probe"] == [1, 2, 3, 4, 2.5, 3]


def test_a_state_that_would_not_be_loaded_is_refused_when_it_is_saved(tmp_path: Path) -> None:
    def saves(config: Config, run: Run) -> None:
        run.report(1, loss=1.0)
        run.save({"model": Fraction(1, 2)})

    with pytest.raises(RunError) as raised:
        attempt(_swept(saves), tmp_path / "a", 1)
    assert "a saved state must hold tensors, arrays, numbers" in str(raised.value)
    assert "fractions.Fraction" in str(raised.value)
    assert checkpoint.find(tmp_path / "a" / "checkpoints") == []
    assert attempt(_swept(saves, pickled=True), tmp_path / "b", 1) is not None


@pytest.mark.parametrize(
    ("reports", "said"),
    [
        ([(1, {"seen": 1.0})], "run.report must be given loss at the end, by which runs are ranked; got seen"),
        ([], "run.report must be given loss at the end, by which runs are ranked; got nothing"),
        ([(2, {"loss": 1.0}), (1, {"loss": 1.0})], "run.report must be given whole epochs or steps that do not fall; got 1 after 2"),
        ([(1.5, {"loss": 1.0})], "run.report must be given whole epochs or steps that do not fall; got 1.5 after -1"),
        ([(1, {"loss": 1.0, "step": 2.0})], "run.report must leave step to the launcher; got a metric of that name"),
        ([(1, {"loss": "low"})], "run.report must be given numbers; got loss='low', a str"),
        ([(0, {})], "run.report must be given a metric with 0, at which nothing is trained yet; got none: leave that report out"),
    ],
)
def test_a_wrong_report_is_one_line(reports: list[Any], said: str, tmp_path: Path) -> None:
    def trains(config: Config, run: Run) -> None:
        for epoch, metrics in reports:
            run.report(epoch, **metrics)

    with pytest.raises(RunError) as raised:
        attempt(_swept(trains), tmp_path, 1)
    assert said in str(raised.value)


def test_a_metric_may_have_any_other_name_and_a_report_none(tmp_path: Path) -> None:
    def trains(config: Config, run: Run) -> None:
        run.report(0, loss=3.0)
        run.report(epoch=1)
        run.report(2, loss=1.0, self=2.0)

    result = attempt(_swept(trains), tmp_path, 1)
    assert result is not None
    assert result.metrics == {"loss": 1.0, "self": 2.0}
    assert list(result.probes) == ["0", "1", "2"]


def test_a_loss_that_is_no_number_is_missing_and_no_value(tmp_path: Path) -> None:
    def diverges(config: Config, run: Run) -> None:
        run.report(1, loss=float("nan"), seen=3)

    result = attempt(_swept(diverges), tmp_path, 1)
    assert result is not None
    assert (result.metrics, result.missing) == ({"seen": 3.0}, {"loss": "loss was nan at its last report"})


def test_a_save_before_the_report_of_its_epoch_is_refused(tmp_path: Path) -> None:
    def wrong(config: Config, run: Run) -> None:
        for epoch in run.epochs():
            run.save(epoch)
            run.report(epoch, loss=1.0)

    with pytest.raises(RunError, match=r"run\.save must follow run\.report of the same epoch"):
        attempt(_swept(wrong), tmp_path, 1)


def test_version_and_data_are_part_of_the_run_id_and_their_absence_is_not(tmp_path: Path) -> None:
    plain = _swept(train)
    assert set(identity(plain)) == {"lr", "epochs", "seed", "task"}
    second, third = _swept(train, version="2"), _swept(train, version="3")
    assert identity(second)["task_version"] == "2"
    on_data = _swept(train, data=lambda config: f"{config.lr} images")
    (on_data,), _ = task_named(on_data.task).identified([on_data])
    assert identity(on_data)["data_fingerprint"] == "0.1 images"
    assert len({signature(config) for config in (plain, second, third, on_data)}) == 4


def test_steps_may_take_the_place_of_epochs_and_neither_is_needed(tmp_path: Path) -> None:
    @dataclasses.dataclass
    class Steps:
        steps: int = 30
        seed: int = 1

    @dataclasses.dataclass
    class Once:
        seed: int = 1

    def steps(config: Steps, run: Run) -> None:
        for step in run.epochs():
            if step % 10 == 0 and not run.report(step, loss=1 / step):
                return

    result = attempt(_swept(steps, Steps), tmp_path / "steps", 1)
    assert result is not None
    assert list(result.probes) == ["10", "20", "30"]
    with pytest.raises(ValueError, match=r"^steps must be at least 1; got 0$"):
        compose_job(["steps=0"], _swept(steps, Steps).task)
    once = attempt(_swept(lambda config, run: run.report(1, loss=2.0), Once), tmp_path / "once", 1)
    assert once is not None
    assert once.metrics == {"loss": 2.0}


def _without(**changed: Any) -> Any:
    fields = {"seed": 1, "epochs": 2, **changed}
    return dataclasses.make_dataclass("Config", [(key, int, dataclasses.field(default=value)) for key, value in fields.items()])


@pytest.mark.parametrize(
    ("kind", "more", "said"),
    [
        (dict, {}, "Config must be a dataclass; got"),
        (
            dataclasses.make_dataclass("Config", [("seed", int)]),
            {},
            "Config must have a default for each field; got Config.seed",
        ),
        (dataclasses.make_dataclass("Config", [("lr", int, 1)]), {}, "Config must have a field seed; got Config without it"),
        (_without(task_version=1), {"version": "2"}, "Config must leave task_version to the launcher; got Config.task_version"),
        (Config, {"direction": "down"}, "direction must be one of maximize, minimize; got 'down'"),
        (Config, {"objective": ""}, "objective must name the metric that ranks configurations; got none"),
    ],
)
def test_what_is_no_task_is_one_line(kind: Any, more: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=rf"^{said}"):
        PlainTask(kind, train, **{"objective": "loss", **more})


def test_a_task_that_no_file_holds_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"^a task must stand at the top of a file, .*; got one that no imported file holds"):
        SweepSpec(task=PlainTask(Config, train, objective="loss")).resolved()


def test_a_folder_of_the_program_s_own_is_kept_over_attempts(config: Any, tmp_path: Path) -> None:
    def writes(config: Config, run: Run) -> None:
        (run.folder / f"{run.attempt}").touch()
        run.log.warning("rank %d of %d", run.rank, run.ranks)
        if run.attempt == 2:
            run.report(1, loss=0.0)
        else:
            assert run.should_stop

    config = _swept(writes)
    assert attempt(config, tmp_path, 1, stop=lambda: True) is None
    assert attempt(config, tmp_path, 2) is not None
    assert {path.name for path in (RunFolder(tmp_path).path / "files").iterdir()} == {"1", "2"}
