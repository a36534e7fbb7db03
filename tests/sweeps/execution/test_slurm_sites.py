"""Sites that forbid what most allow, and a Slurm that answers badly: the sweep ends by itself, and each trial runs once."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sweeps.state.submission import Submission
from tests.support.sample import seeded
from tests.support.site_bench import ENVIRONMENT, check_once, flaky_path, preempt, quick_sweep, submit
from tests.support.slurm_bench import ROOT, needs_slurm
from tests.support.slurm_cluster import NO_REQUEUE, SlurmCluster

pytestmark = [needs_slurm, pytest.mark.slow, pytest.mark.xdist_group("slurm-3")]


def never_watched(cluster: SlurmCluster, runs: Path, trials: int, preemptions: int) -> None:
    """Under a limit of 4 jobs, without arrays and requeues, and with a preemption that cancels."""
    cluster.change(max_array_size=1, plugin=NO_REQUEUE, preempt_mode="CANCEL", grace_seconds=0)
    cluster.limit(MaxSubmitJobs=4)
    sweep = quick_sweep(cluster, runs)
    try:
        out = submit(sweep, trials, "partition=gpu-preempt")
        assert out.count("submitted job") == 3
        assert f"{trials - 3} of {trials} workers are not submitted yet" in out
        for preemption in range(1, preemptions + 1):
            ended = trials * preemption // (preemptions + 2)
            sweep.wait(f"{ended} results", lambda n=ended: len(list(sweep.path.glob("trials/*/result.json"))) >= n, 400)
            cluster.limit(MaxSubmitJobs=5)
            preempt(cluster)
            cluster.limit(MaxSubmitJobs=4)
        sweep.wait_for_end(500)
    finally:
        cluster.limit(MaxSubmitJobs=-1)
    past = check_once(sweep, trials)
    assert all(c.slurm is not None and c.slurm.restart == 0 for claims_of in past for c in claims_of)
    assert preemptions or [len(claims_of) for claims_of in past] == [1] * trials


def test_a_sweep_ends_unwatched_where_little_is_allowed(cluster: SlurmCluster, tmp_path: Path) -> None:
    never_watched(cluster, tmp_path, 5, 0)


@pytest.mark.nightly
def test_forty_trials_end_unwatched_where_little_is_allowed(cluster: SlurmCluster, tmp_path: Path) -> None:
    never_watched(cluster, tmp_path, 40, 2)


def through_bad_answers(cluster: SlurmCluster, folder: Path, seed: str, trials: int, calls: int, looks: int) -> None:
    """Run a sweep that grows until so many of Slurm's clients were called; look at it so often each time."""
    path, sweep, log = flaky_path(cluster, folder, seed), quick_sweep(cluster, folder / "runs"), folder / "calls"
    deadline, ended = time.monotonic() + 1500, 0
    while not ended or len(log.read_text().splitlines()) < calls:
        assert time.monotonic() < deadline
        ended += trials
        submit(sweep, ended, PATH=path)
        # The same command again, while all is under way: nothing is missing.
        assert "submitted job" not in submit(sweep, ended, PATH=path)
        for _ in range(looks):
            done = subprocess.run(
                [sys.executable, "-m", "sweeps", "status", str(sweep.path), "--json"],
                env={**cluster.environment, **ENVIRONMENT, "PATH": path}, cwd=ROOT, capture_output=True, text=True, timeout=200, check=True,
            )  # fmt: skip
            counts = json.loads(done.stdout)["counts"]
            assert counts["interrupted"] + counts["cancelled"] + counts["failed"] == 0, counts
        sweep.wait_for_end(500)
        past = check_once(sweep, ended)
        assert [len(claims_of) for claims_of in past] == [1] * ended
        assert len(sweep.jobs()) == ended
        assert sum(s.size for s in Submission.all_of(sweep.sweep) if s.job) == ended


@seeded
@pytest.mark.nightly  # in the suite tests/sweeps/execution/test_submitting.py plays such a Slurm
def test_some_bad_answers_of_slurm_change_nothing(cluster: SlurmCluster, tmp_path: Path, seed: str) -> None:
    through_bad_answers(cluster, tmp_path, seed, trials=4, calls=10, looks=2)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_five_hundred_calls_of_which_a_third_goes_wrong_change_nothing(cluster: SlurmCluster, tmp_path: Path) -> None:
    through_bad_answers(cluster, tmp_path, "1", trials=12, calls=500, looks=20)
