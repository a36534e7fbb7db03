"""A sweep on this machine, beside other commands of the same sweep."""

import argparse
import dataclasses
from pathlib import Path

import pytest

from cnnjepa.run.folder import RunFolder, RunResult, RunStatus
from jobs.config import compose_job
from sweeps.cli import local
from sweeps.execution.changes import take_up
from sweeps.execution.monitor import wide_console
from sweeps.spec.sweep import ScaleName, build_trials
from sweeps.state.folder import Sweep
from sweeps.state.view import View
from tests.support.tiny_sweep import CONFIGURATIONS, sweep


def test_a_command_waits_where_another_one_runs_a_failed_trial_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one sets the failed trial aside between this one's last look at the trials and the closing table."""
    spec = dataclasses.replace(sweep(), configurations=CONFIGURATIONS[:1])
    made = Sweep.of(spec, ScaleName.smoke, build_trials(spec, spec.smoke, 1, "local", []), tmp_path / "tiny_sweep-smoke")
    run, failed = made.run(made.trials[0]), RunResult(RunStatus.failed, "it diverged", claim=1)
    looks: list[bool] = []

    def run_missing(*_: object) -> bool:
        if looks:
            run.write_result(failed)
        else:
            run.set_aside(RunStatus.failed)
        looks.append(True)
        return True

    monkeypatch.setattr(local, "run_missing", run_missing)
    monkeypatch.setattr(local, "conclude", lambda *_: 1)
    run.prepare(made.trials[0].config)
    run.write_result(failed)
    asked = argparse.Namespace(retry_failed=False, typed=0.0, keep=False, rerun=False, embedded=False, words=None, until_decided=None)
    assert local.run(made, compose_job(["cluster=local"]).cluster, asked, wide_console()) == 1
    assert len(looks) == 2


def test_a_failure_since_the_command_was_typed_is_another_ones_retry(tmp_path: Path) -> None:
    """Four commands with --retry-failed, typed at once, retry each failed trial once."""
    spec = dataclasses.replace(sweep(), configurations=CONFIGURATIONS[:1])
    made = Sweep.of(spec, ScaleName.smoke, build_trials(spec, spec.smoke, 1, "local", []), tmp_path / "tiny_sweep-smoke")
    run = made.run(made.trials[0])
    made.write()
    run.prepare(made.trials[0].config)
    run.write_result(RunResult(RunStatus.failed, "it diverged"))
    take_up(View(made), True, typed=run.ended_at() - 1)
    assert run.result() is not None
    take_up(View(made), True, typed=run.ended_at() + 1)
    assert run.result() is None


def test_two_commands_may_set_a_trial_aside_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(tmp_path)
    run.write_result(RunResult(RunStatus.failed, "it diverged"))
    named = RunFolder._aside

    def then_another_renames_it(self: RunFolder, status: RunStatus) -> Path:
        path = named(self, status)
        (tmp_path / "result.json").rename(path)
        return path

    monkeypatch.setattr(RunFolder, "_aside", then_another_renames_it)
    run.set_aside(RunStatus.failed)
    assert [p.name for p in tmp_path.glob("result*")] == ["result.failed-1.json"]
