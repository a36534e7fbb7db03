"""Sites that forbid what most allow, and a Slurm that answers badly: the sweep ends by itself, and each trial runs once."""

import io
import json
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console

from sweeps.execution import monitor
from sweeps.state.submission import Submission
from tests.support import flaky_slurm
from tests.support.sample import seeded
from tests.support.site_bench import ENVIRONMENT, SCRIPT, check_once, flaky_path, preempt, quick_sweep, submit
from tests.support.slurm_bench import ROOT, SweepOnSlurm, needs_slurm
from tests.support.slurm_cluster import SlurmCluster
from tests.support.slurm_files import NO_REQUEUE

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


@pytest.mark.nightly
def test_preflight_checks_a_node_where_there_are_no_arrays(cluster: SlurmCluster, tmp_path: Path) -> None:
    cluster.change(max_array_size=1)
    line = [sys.executable, "-m", "jobs.preflight", "--cluster", "test_cluster", "--on-node", "--workers", "4", "--runs-dir", str(tmp_path)]
    words = [*line, "ranks_per_trial=1", "cores_per_trial=1"]
    done = subprocess.run(words, env=cluster.environment, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sbatch --test-only accepts the script, a single job\n" in done.stdout
    assert re.search(r"^ok +node: gpu0\d: torch", done.stdout, re.M), done.stdout


def ever_submitted(sweep: SweepOnSlurm) -> list[str]:
    """Return the jobs of the sweep, also those that squeue has forgotten."""
    lines = sweep.cluster.run("sacct", "-X", "-n", "-P", "-S", "now-1days", "-o", "JobID,JobName").splitlines()
    names = {s.name for s in Submission.all_of(sweep.sweep)}
    return [job for job, name in (line.split("|") for line in lines) if name in names]


def watch(sweep: SweepOnSlurm) -> str:
    """Watch in this process until the sweep ends, without the pauses between two looks; return what is said."""
    console = Console(file=io.StringIO(), width=200)
    assert monitor.SlurmWatch(sweep.path, console).run() == 0
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def let_go(log: Path, calls: int, file: Path) -> None:
    """Let the jobs begin their trials once so many of Slurm's clients were called, or after a quarter of an hour."""
    deadline = time.monotonic() + 900
    while len(log.read_text().splitlines()) < calls and time.monotonic() < deadline:
        time.sleep(0.2)
    file.touch()


def through_bad_answers(cluster: SlurmCluster, folder: Path, seed: str, trials: int, calls: int, patch: pytest.MonkeyPatch) -> None:
    """Submit and watch a sweep whose jobs wait until so many of Slurm's clients were called. It prints its figures."""
    path, sweep, log = flaky_path(cluster, folder, seed), quick_sweep(cluster, folder / "runs"), folder / "calls"
    began, go = time.monotonic(), folder / "go"
    words = ["max_parallel=4", f"setup=['until [ -e {go} ]; do sleep 0.2; done']"]
    for part in (trials // 3, 2 * trials // 3, trials):
        submit(sweep, part, *words, PATH=path)
    # The same command again, while all is under way: nothing is missing.
    assert "submitted job" not in submit(sweep, trials, *words, PATH=path)
    command = [sys.executable, "-m", "sweeps", "status", str(sweep.path), "--json"]
    environment = {**cluster.environment, **ENVIRONMENT, "PATH": path}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=True)
    counts = json.loads(done.stdout)["counts"]
    assert counts["interrupted"] + counts["cancelled"] + counts["failed"] == 0, counts
    patch.setattr(monitor, "_LOOK_SECONDS", 0.2)
    patch.syspath_prepend(str(SCRIPT.parent))  # of the trainer
    threading.Thread(target=let_go, args=(log, calls, go), daemon=True).start()
    with patch.context() as here:
        here.setenv("PATH", path)
        assert "submitted again" not in watch(sweep)
    sweep.wait_for_end(200)
    past = check_once(sweep, trials)
    assert [len(claims_of) for claims_of in past] == [1] * trials
    sweep.wait("the accounting", lambda: len(ever_submitted(sweep)) >= trials, 60)
    assert len(ever_submitted(sweep)) == trials
    assert sum(s.size for s in Submission.all_of(sweep.sweep) if s.job) == trials
    made = [line.split()[0] for line in log.read_text().splitlines()]
    befallen: Counter[str] = Counter(kind for number in range(len(made)) if (kind := flaky_slurm.kind_of(seed, number)))
    figures: dict[str, object] = {"calls": len(made), "by_client": Counter(made), "faults": befallen.total(), "by_kind": befallen}
    figures |= {"seconds": round(time.monotonic() - began), "completed": trials, "doubled": len(ever_submitted(sweep)) - trials}
    print(json.dumps(figures))
    assert len(made) >= calls
    assert calls < 100 or befallen.total() / len(made) == pytest.approx(flaky_slurm.SHARE, abs=0.07)
    assert calls < 100 or set(befallen) == set(flaky_slurm.KINDS)


@seeded
@pytest.mark.nightly  # in the suite tests/sweeps/execution/test_submitting.py plays such a Slurm
def test_some_bad_answers_of_slurm_change_nothing(
    cluster: SlurmCluster, tmp_path: Path, seed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    through_bad_answers(cluster, tmp_path, seed, 4, 10, monkeypatch)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_five_hundred_calls_of_which_a_third_goes_wrong_change_nothing(
    cluster: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    through_bad_answers(cluster, tmp_path, "1", 12, 500, monkeypatch)
