"""Workers, without Ray: what is claimed next, and what a dead or crashing owner leaves."""

import contextlib
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import optuna
import pytest

from cnnjepa.run.folder import RunResult, RunStatus
from jobs.config import compose_job
from sweeps.execution import rounds, worker
from sweeps.execution.scheduler import next_claim, not_begun
from sweeps.execution.worker import run_one_trial
from sweeps.report import optuna_study
from sweeps.spec.sweep import Configuration, Scale, ScaleName, Search, Trial, build_trials
from sweeps.state import claims
from sweeps.state.claims import Process
from sweeps.state.folder import Sweep
from sweeps.state.trial_state import TrialState
from sweeps.state.view import View
from tests.support.tiny_sweep import sweep

ROOT = Path(__file__).parents[3]
CLUSTER = compose_job(["cluster=local"]).cluster


@pytest.fixture
def tiny(tmp_path: Path) -> Sweep:
    spec = sweep()
    trials = build_trials(spec, spec.smoke, 2, "local", ["epochs=1", "optimizer.warmup_epochs=0"])
    made = Sweep.of(spec, ScaleName.smoke, trials, tmp_path / "tiny_sweep-smoke")
    made.write()
    return made


def never() -> bool:
    return False


def dead() -> Process:
    me = Process.me()
    return Process(me.host, me.boot, me.namespace, me.pid, me.started - 1000)


def abandon(made: Sweep, number: int, epoch: int, driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A claim whose owner is gone."""
    gone = dead()
    with monkeypatch.context() as patch:
        patch.setattr(Process, "me", staticmethod(lambda: gone))
        assert claims.claim(made.trial_dir(made.trials[number]), epoch, driver, 0)


def test_trials_are_one_seed_of_all_configurations_before_the_next(tiny: Sweep) -> None:
    assert [(t.label, t.seed) for t in tiny.trials] == [
        (configuration, seed) for seed in (42, 43) for configuration in ("depth 1", "depth 2", "pointwise")
    ]
    assert len({t.signature for t in tiny.trials}) == 6


def test_the_sweep_survives_its_file(tiny: Sweep) -> None:
    assert Sweep.load(tiny.path) == tiny


def test_the_papers_values_are_kept_at_paper_scale_alone(tiny: Sweep) -> None:
    assert tiny.paper == {}
    assert Sweep.of(sweep(), ScaleName.paper, tiny.trials, tiny.path).paper["depth 2"] == {"linear.test_top1": 73.22}


def test_two_equal_configurations_are_refused() -> None:
    spec = sweep()
    again = Configuration({"method.predictor.depth": 1, "method.predictor.kernel": 3})
    doubled = dataclasses.replace(spec, configurations=[*spec.configurations, again])
    with pytest.raises(
        ValueError, match="configurations of tiny_sweep must differ; got the same configuration for depth 1 and depth 1, kernel 3"
    ):
        build_trials(doubled, spec.smoke, 1, "local", [])


def test_configurations_that_are_called_the_same_are_refused() -> None:
    spec = dataclasses.replace(sweep(), named_by=("method.predictor.depth",))
    twice = dataclasses.replace(
        spec, configurations=[*spec.configurations, Configuration({"method.predictor.depth": 1, "method.predictor.kernel": 5})]
    )
    with pytest.raises(ValueError, match=r"differ in the keys that name them \(named_by\); got depth 1 2 times"):
        build_trials(twice, spec.smoke, 1, "local", [])


def test_a_configuration_is_called_by_what_it_sets() -> None:
    ijepa = Configuration({"method": "ijepa", "encoder.name": "vit_small", "epochs": 300})
    spec = dataclasses.replace(sweep(), named_by=("method", "encoder.name"), configurations=[ijepa])
    assert spec.labels(Scale([], 1)) == ["I-JEPA, vit_small"]
    others = [Configuration({"optimizer.lr": 0.01, "method.predictor.conv": "dense"}), Configuration({})]
    assert dataclasses.replace(sweep(), configurations=others).labels(Scale([], 1)) == ["lr 0.01, dense", "unchanged"]


def test_a_half_done_trial_comes_before_a_new_one(tiny: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    abandon(tiny, 3, 1, dead().driver, monkeypatch)
    got = [next_claim(View(tiny), Process.me().driver) for _ in range(7)]
    assert [g and g[0].number for g in got] == [3, 0, 1, 2, 4, 5, None]
    assert got[0] is not None
    assert got[0][1].claim.attempt == 2


def test_an_ablations_worker_takes_pending_trials_in_order_and_imports_no_optuna(tiny: Sweep) -> None:
    code = """
import sys
from pathlib import Path
import sweeps.execution.worker_main, sweeps.execution.worker
from sweeps.execution.scheduler import next_claim
from sweeps.state.folder import Sweep
from sweeps.state.view import View
view, held = View(Sweep.load(Path(sys.argv[1]))), []
while (got := next_claim(view, "d")) is not None:
    held.append(got)
print([trial.number for trial, _ in held], "optuna" in sys.modules)
"""
    line, environment = [sys.executable, "-c", code, str(tiny.path)], {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True, env=environment)
    assert done.stdout.strip() == "[0, 1, 2, 3, 4, 5] False"


def test_a_trial_that_another_worker_took_is_not_taken_twice(tiny: Sweep) -> None:
    view = View(tiny)
    named = next(not_begun(view))
    first = next_claim(View(tiny), Process.me().driver)
    assert first is not None
    assert first[0].number == 0
    assert named == tiny.trials[0]  # it was pending when it was looked at, and the claim refuses it
    assert claims.claim(tiny.trial_dir(tiny.trials[0]), 1, "d", 0) is None
    again = next_claim(view, Process.me().driver)
    assert again is not None
    assert again[0].number == 1


def test_a_trial_whose_process_dies_twice_in_place_is_failed(tiny: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    me = Process.me().driver
    for epoch in (1, 2):
        abandon(tiny, 0, epoch, me, monkeypatch)
    got = next_claim(View(tiny), me)
    assert got is not None
    assert got[0].number == 1
    result = tiny.run(tiny.trials[0]).result()
    assert result is not None
    assert result.status is RunStatus.failed
    assert "its process died 2 times at step 0 without gaining a step" in result.cause


def test_deaths_of_killed_drivers_never_fail_a_trial(tiny: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    for epoch in (1, 2, 3, 4):
        abandon(tiny, 0, epoch, dead().driver, monkeypatch)
    got = next_claim(View(tiny), Process.me().driver)
    assert got is not None
    assert (got[0].number, got[1].claim.attempt) == (0, 5)


def test_a_silent_owner_on_another_host_is_taken_over_by_a_worker_that_knows(tiny: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = Process("elsewhere", "boot", "", 1, 0.0)
    for trial in tiny.trials:
        with monkeypatch.context() as patch:
            patch.setattr(Process, "me", staticmethod(lambda: elsewhere))
            assert claims.claim(tiny.trial_dir(trial), 1, "d", 0)
    assert View(tiny).hosts_elsewhere() == ["elsewhere"]
    assert next_claim(View(tiny), Process.me().driver) is None
    watched = View(tiny)
    monkeypatch.setattr(watched.watch, "_silence", 0.0)
    assert set(watched.states().values()) == {TrialState.interrupted}
    got = next_claim(View(tiny, watched.watch.silent), Process.me().driver)
    assert got is not None
    assert (got[0].number, got[1].claim.attempt) == (0, 2)


def test_the_study_of_an_ablation_shows_what_the_folders_say(tiny: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    done = RunResult(RunStatus.completed, metrics={"linear.holdout_top1": 51.5})
    for number, result in (
        (0, done),
        (1, RunResult(RunStatus.failed, "broke")),
        (2, RunResult(RunStatus.completed, missing={"linear": "x"})),
    ):
        folder = tiny.run(tiny.trials[number])
        folder.prepare(tiny.trials[number].config)
        folder.write_result(result)
    abandon(tiny, 3, 1, dead().driver, monkeypatch)
    shown = optuna_study.study_of(View(tiny)).get_trials()
    state = optuna.trial.TrialState
    assert [t.state for t in shown] == [state.COMPLETE, state.FAIL, state.FAIL, state.RUNNING, state.WAITING, state.WAITING]
    assert [t.value for t in shown] == [51.5, None, None, None, None, None]
    assert shown[0].params == {"setting": "depth 1"}
    assert [t.user_attrs["signature"] for t in shown] == [t.signature for t in tiny.trials]


def test_a_worker_runs_one_trial_and_reports_where_it_is(tiny: Sweep) -> None:
    assert run_one_trial(View(tiny), CLUSTER, Process.me().driver, lambda: True) is None
    signature = run_one_trial(View(tiny), CLUSTER, Process.me().driver, never)
    assert signature == tiny.trials[0].signature
    view = View(tiny)
    assert view.state(tiny.trials[0]) is TrialState.completed
    assert view.state(tiny.trials[1]) is TrialState.waiting
    log = (tiny.trial_dir(tiny.trials[0]) / "log" / "train.log").read_text()
    assert "step 5/5" in log


def test_a_worker_that_lost_its_claim_stops_and_leaves_the_result_to_the_new_owner(tiny: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_CHECK_SECONDS", 0.0)
    calls = iter(range(1000))

    def usurp() -> bool:
        if next(calls) == 2:
            assert claims.claim(tiny.trial_dir(tiny.trials[0]), 2, "d", 0)
        return False

    run_one_trial(View(tiny), CLUSTER, Process.me().driver, usurp)
    assert tiny.run(tiny.trials[0]).result() is None


def test_a_worker_that_raises_twice_in_place_fails_its_trial_and_not_the_sweep(tiny: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes wrong outside the training, such as a full disk, is raised; the trial is not tried for ever."""

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    me = Process.me().driver
    with monkeypatch.context() as patch:
        patch.setattr(worker, "run_job", full)
        for _ in range(2):
            with pytest.raises(OSError, match="No space left"):
                run_one_trial(View(tiny), CLUSTER, me, never)
    got = next_claim(View(tiny), me)
    assert got is not None
    assert got[0].number == 1
    assert View(tiny).state(tiny.trials[0]) is TrialState.failed


def test_a_result_is_written_once_for_a_claim_and_a_later_claim_stands(tiny: Sweep) -> None:
    folder = tiny.run(tiny.trials[0])
    folder.prepare(tiny.trials[0].config)
    assert folder.write_result(RunResult(RunStatus.completed, claim=2))
    assert not folder.write_result(RunResult(RunStatus.failed, "stale", claim=1))
    assert folder.result() == RunResult(RunStatus.completed, claim=2)
    assert not folder.write_result(RunResult(RunStatus.failed, "again", claim=2))
    assert folder.write_result(RunResult(RunStatus.completed, step=7, claim=3))
    assert folder.result() == RunResult(RunStatus.completed, step=7, claim=3)
    assert not [p for p in os.listdir(folder.path) if p.endswith(".tmp")]


def shown() -> None: ...


def test_workers_that_find_nothing_since_another_command_was_faster_are_no_error(tiny: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    def overtaken(_: View) -> int:
        for trial in tiny.trials:  # between the count of what may begin and the workers
            with claims.claim(tiny.trial_dir(trial), 1, "another", 0) or contextlib.nullcontext():
                tiny.run(trial).write_result(RunResult(RunStatus.completed))
        return 0

    with monkeypatch.context() as patch:
        patch.setattr(rounds, "trials_to_begin", overtaken)
        assert rounds.run_round(View(tiny), lambda *_: [], 2, shown, never)
    assert not rounds.run_round(View(tiny), lambda *_: [], 2, shown, never)


def test_workers_that_end_before_they_claim_anything_are_an_error(tiny: Sweep) -> None:
    with pytest.raises(RuntimeError, match="workers end before they claim a trial: no memory"):
        rounds.run_round(View(tiny), lambda *_: ["no memory"], 2, shown, never)
    assert rounds.run_round(View(tiny), lambda *_: ["no memory"], 2, shown, lambda: True)  # they were stopped


@pytest.mark.parametrize("search", [False, True])
def test_a_round_has_a_worker_for_each_trial_that_may_begin_or_go_on_and_in_a_search_for_each_place(
    search: bool, tiny: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    abandon(tiny, 0, 1, "another", monkeypatch)  # goes on
    with claims.claim(tiny.trial_dir(tiny.trials[1]), 1, "another", 0) or contextlib.nullcontext():
        tiny.run(tiny.trials[1]).write_result(RunResult(RunStatus.completed))
    places: list[int] = []

    def place(workers: int, silent: frozenset[Path]) -> list[str]:
        places.append(workers)
        return []

    wide = dataclasses.replace(tiny, search=Search([], {}, "", 9, 1, False, None, "") if search else None)
    view = View(wide)
    assert view.state(tiny.trials[0]) is TrialState.interrupted
    with monkeypatch.context() as patch:
        if search:
            patch.setattr(rounds, "trials_to_begin", lambda _: 7)
        assert rounds.run_round(view, place, 3, shown, lambda: True)
    assert places == [3 if search else 5]


def test_each_attempt_prints_into_its_own_log_after_what_was_printed_before(tmp_path: Path) -> None:
    logs, claimed = tmp_path / "log", tmp_path / "claim"
    claimed.mkdir()
    (claimed / "000001.json").touch()
    with worker.output_to(tmp_path, 1):
        print("first begins")
        (claimed / "000002.json").touch()
        with worker.output_to(tmp_path, 2):
            print("second begins")
        print("first wakes up", flush=True)
    assert (logs / "train.log").read_text() == "first begins\nsecond begins\n"
    assert (logs / "train.1.log").read_text() == "first begins\nfirst wakes up\n"
    for attempt in (3, 4):
        (claimed / f"00000{attempt}.json").touch()
        with worker.output_to(tmp_path, attempt):
            print(attempt)
    assert (logs / "train.log").read_text() == "first begins\nsecond begins\n3\n4\n"
    assert sorted(p.name for p in logs.iterdir()) == ["train.3.log", "train.4.log", "train.log"]


def test_a_trial_that_ends_between_two_looks_is_not_claimed_again(tiny: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    abandon(tiny, 0, 1, dead().driver, monkeypatch)
    view, state = View(tiny), View.state

    def then_it_ends(self: View, trial: Trial) -> TrialState:
        found = state(self, trial)
        tiny.run(tiny.trials[0]).write_result(RunResult(RunStatus.completed, claim=1))
        return found

    monkeypatch.setattr(View, "state", then_it_ends)
    got = next_claim(view, Process.me().driver)
    assert got is not None
    assert got[0].number == 1
    assert len(claims.history(tiny.trial_dir(tiny.trials[0]))) == 1
