"""What a view makes of a sweep's folder: hours, hosts, what is read again and what is not."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from cnnjepa.run.folder import RunResult, RunStatus
from sweeps.spec.sweep import ScaleName, Trial
from sweeps.state import claims
from sweeps.state import view as looking
from sweeps.state.claims import Process, SlurmStart
from sweeps.state.folder import Sweep
from sweeps.state.trial_state import TrialState
from sweeps.state.view import View

EMPTY = {"epochs": 4}


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    made = Sweep(
        tmp_path,
        "x",
        "?",
        ScaleName.smoke,
        "o",
        [],
        {},
        [Trial(i, f"s{i}", 42, EMPTY, f"trial{i}") for i in range(3)],
        rungs=[2, 3, 4, 6],
        eta=2,
    )
    made.write()
    return made


def held(sweep: Sweep, number: int, epoch: int, seconds: float, gpus: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A claim, in a Slurm job that held GPUs or outside of one, whose owner was last heard of after so many seconds."""
    start = None if gpus is None else SlurmStart("mini", "7", 0, "gpu01", gpus, "/log", "/code")
    at = sweep.trial_dir(sweep.trials[number])
    with monkeypatch.context() as patch:
        patch.setattr(claims.time, "time", lambda: 1000.0)
        assert claims.claim(at, epoch, "d", 0, start)
    os.utime(at / "claim" / f"{epoch:06d}.json", (1000 + seconds, 1000 + seconds))


def end(sweep: Sweep, number: int, status: RunStatus = RunStatus.completed, hours: float = 0.0, score: float = 1.0) -> None:
    trial = sweep.trials[number]
    sweep.trial_dir(trial).mkdir(parents=True, exist_ok=True)
    sweep.run(trial).write_result(RunResult(status, metrics={"o": score}, device_hours=hours, probes={"2": {"o": 5.0}}))


def test_a_trial_costs_what_its_jobs_held_in_slurm_and_elsewhere_what_its_training_took(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    held(sweep, 0, 1, 1800, 4, monkeypatch)  # 2 GPU-hours of a start whose steps were lost
    held(sweep, 0, 2, 3600, 2, monkeypatch)
    held(sweep, 1, 1, 3600, None, monkeypatch)
    held(sweep, 2, 1, 3600, 0, monkeypatch)  # a job without a GPU
    for number in range(3):
        end(sweep, number, hours=0.25)
    assert [View(sweep).device_hours(t) for t in sweep.trials] == [4.0, 0.25, 0.25]


def test_hosts_elsewhere_are_those_of_owners_that_run(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, host in enumerate(("b", "a", "b")):
        elsewhere = Process(host, "boot", "", 1, 0.0)
        with monkeypatch.context() as patch:
            patch.setattr(Process, "me", staticmethod(lambda owner=elsewhere: owner))
            assert claims.claim(sweep.trial_dir(sweep.trials[number]), 1, "d", 0)
    assert View(sweep).hosts_elsewhere() == ["a", "b"]
    end(sweep, 1)
    assert View(sweep).hosts_elsewhere() == ["b"]


def test_a_state_is_remembered_for_so_long_and_an_end_for_good(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    now, looks = [0.0], []
    monkeypatch.setattr(looking.time, "monotonic", lambda: now[0])
    view = View(sweep, remember_seconds=10.0)
    look = view._look
    monkeypatch.setattr(view, "_look", lambda trial: looks.append(trial.number) or look(trial))
    first = sweep.trials[0]
    assert view.state(first) is TrialState.waiting
    end(sweep, 0)
    now[0] = 9.9
    assert view.state(first) is TrialState.waiting
    assert len(looks) == 1
    now[0] = 10.0
    assert view.state(first) is TrialState.completed
    now[0] = 1e9
    view.look_again()
    assert view.state(first) is TrialState.completed
    assert len(looks) == 2
    view.state(sweep.trials[1])
    view.look_again()
    view.state(sweep.trials[1])
    assert len(looks) == 4


def test_values_at_a_rung_are_of_every_trial_that_came_there(sweep: Sweep) -> None:
    end(sweep, 0)
    at = sweep.trial_dir(sweep.trials[1])
    at.mkdir(parents=True)
    (at / "metrics.jsonl").write_text('{"kind": "probe", "step": 2, "epoch": 2.0, "o": 7.0}\n{"kind": "probe", "step": 4, "epoch": 4.0}\n')
    view = View(sweep)
    assert view.rung_values(2, 42) == {"trial0": 5.0, "trial1": 7.0}
    assert view.rung_values(4, 42) == {}
    assert view.rung_values(2, 43) == {}
    with open(at / "metrics.jsonl", "a") as file:
        file.write('{"kind": "probe", "step": 4, "epoch": 4.0, "o": 8.0}\n')
    assert view.rung_values(4, 42) == {"trial1": 8.0}
    # A resumed run's file begins again, and may be shorter: what was known of it stays true.
    (at / "metrics.jsonl").write_text('{"kind": "probe", "step": 3, "epoch": 3.0, "o": 9.0}\n')
    assert [view.rung_values(epoch, 42).get("trial1") for epoch in (2, 3, 4)] == [7.0, 9.0, 8.0]


def test_the_records_of_another_owner_are_read_from_their_start(sweep: Sweep) -> None:
    at = sweep.trial_dir(sweep.trials[1])
    at.mkdir(parents=True)
    (at / "metrics.jsonl").write_text('{"kind": "probe", "step": 2, "epoch": 2.0, "o": 7.0}\n{"kind": "step", "step": 3, "epoch": 3.0}\n')
    view = View(sweep)
    assert view.rung_values(2, 42) == {"trial1": 7.0}
    line = '{"kind": "probe", "step": %d, "epoch": %d.0, "o": %d.0}\n'
    (at / "new").write_text("".join(line % (step, step, step) for step in (2, 4, 6)))
    os.replace(at / "new", at / "metrics.jsonl")
    assert [view.rung_values(epoch, 42)["trial1"] for epoch in (4, 6)] == [4.0, 6.0]


def test_states_that_end_and_those_that_only_rest() -> None:
    final = {TrialState.completed, TrialState.pruned, TrialState.failed}
    assert {s for s in TrialState if s.final} == final
    ended = {*final, TrialState.damaged}
    assert {s for s in TrialState if s.ended} == ended
    assert {s for s in TrialState if s.settled} == {*ended, TrialState.cancelled}


def test_a_sweep_is_the_same_bytes_each_time_it_is_written(sweep: Sweep) -> None:
    first = (sweep.path / "sweep.json").read_bytes()
    replace(sweep).write()
    assert (sweep.path / "sweep.json").read_bytes() == first
    assert Sweep.load(sweep.path) == sweep


def test_a_trial_that_began_and_ended_between_two_looks_has_its_claims(sweep: Sweep) -> None:
    trial = sweep.trials[0]
    view = View(sweep)
    assert view.state(trial) is TrialState.waiting
    owned = claims.claim(sweep.trial_dir(trial), 1, "d", 0)
    assert owned is not None
    with owned:
        end(sweep, 0)
    assert view.state(trial) is TrialState.completed
    assert [c.attempt for c in view.claims(trial)] == [1]
