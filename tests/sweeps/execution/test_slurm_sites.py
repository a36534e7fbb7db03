"""Sites that forbid what most allow, and a Slurm that answers badly: the sweep ends by itself, and each trial runs once."""

import io
import json
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console

from sweeps.execution import monitor
from sweeps.state import claims
from sweeps.state.submission import Submission
from tests.support import flaky_slurm
from tests.support.sample import seeded
from tests.support.slurm_bench import ROOT, SweepOnSlurm, given, needs_slurm
from tests.support.slurm_cluster import SlurmCluster

pytestmark = [needs_slurm, pytest.mark.slow, pytest.mark.xdist_group("slurm-3")]
SCRIPT = ROOT / "tests" / "support" / "site_sweep.py"
ENVIRONMENT = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'support'}"}
ONE_CORE = ["cores_per_trial=1", "gpus_per_trial=1", "gres=gpu:1", "max_parallel=0"]


def quick_sweep(cluster: SlurmCluster, runs: Path) -> SweepOnSlurm:
    """A sweep of short trials, one core each."""
    made = SweepOnSlurm(cluster, runs, ranks=1, held=False)
    made.path = runs / "site_sweep-smoke"
    return made


def submit(sweep: SweepOnSlurm, trials: int, *words: str, **environment: str) -> str:
    whole = {**ENVIRONMENT, **environment}
    profile = [word for word in ONE_CORE if not given(word, words)]
    return sweep.run("--seeds", str(trials), *profile, *words, "--detach", script=SCRIPT, environment=whole, seconds=250)


def check_once(sweep: SweepOnSlurm, trials: int) -> list[list[claims.Claim]]:
    """Every trial completed, and did each epoch once; returns the claims of each."""
    folders = sweep.trial_dirs()
    assert len(folders) == trials
    for folder in folders:
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [r["step"] for r in records if r["kind"] == "step"] == [1, 2, 3, 4]
        assert (folder / "log" / "train.log").read_text().count("begins after epoch") == len(claims.history(folder))
        assert {c.slurm.name for c in claims.history(folder) if c.slurm} <= {s.name for s in Submission.all_of(sweep.sweep)}
        assert json.loads((folder / "result.json").read_text())["status"] == "completed"
    return [claims.history(folder) for folder in folders]


def preempt(cluster: SlurmCluster) -> None:
    """An urgent job on all nodes, which ends at once."""
    words = ["-p", "gpu", f"-N{len(cluster.names)}", "--gres=gpu:4", "-t", "1", "-o", "/dev/null", "--wrap", "true"]
    cluster.run("sbatch", *words, check=False)  # refused where four jobs are queued


def never_watched(cluster: SlurmCluster, runs: Path, trials: int, preemptions: int) -> None:
    """Under a limit of 4 jobs, without arrays and requeues, and with a preemption that cancels."""
    cluster.change(max_array_size=1, requeue=False, preempt_mode="CANCEL", grace_seconds=0)
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


def flaky_path(cluster: SlurmCluster, folder: Path, seed: str) -> str:
    """Return a PATH at whose front are Slurm's clients, of which some calls fail, in jobs too."""
    (folder / "bin").mkdir(parents=True)
    real = Path(shutil.which("sbatch", path=cluster.environment["PATH"]) or "").parent
    values = {"FLAKY_SEED": seed, "FLAKY_LOG": str(folder / "calls"), "FLAKY_REAL": str(real)}
    for name in flaky_slurm.COMMANDS:
        wrapper = folder / "bin" / name
        wrapper.write_text(f"#!{sys.executable} -SE\nimport os\nos.environ |= {values!r}\n{Path(flaky_slurm.__file__).read_text()}")
        wrapper.chmod(0o755)
    return f"{folder / 'bin'}:{cluster.environment['PATH']}"


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


def through_bad_answers(cluster: SlurmCluster, folder: Path, seed: str, trials: int, calls: int, patch: pytest.MonkeyPatch) -> None:
    """Run and watch a sweep that grows until so many of Slurm's clients were called. It prints its figures."""
    path, sweep, log = flaky_path(cluster, folder, seed), quick_sweep(cluster, folder / "runs"), folder / "calls"
    began, ended = time.monotonic(), 0
    patch.setattr(monitor, "_LOOK_SECONDS", 0.2)
    patch.syspath_prepend(str(SCRIPT.parent))  # of the trainer
    while not ended or len(log.read_text().splitlines()) < calls:
        assert time.monotonic() - began < 1500
        ended += trials
        submit(sweep, ended, "max_parallel=2", PATH=path)  # one after the other, so that there is much to watch
        # The same command again, while all is under way: nothing is missing.
        assert "submitted job" not in submit(sweep, ended, "max_parallel=2", PATH=path)
        command = [sys.executable, "-m", "sweeps", "status", str(sweep.path), "--json"]
        words = {"cwd": ROOT, "env": {**cluster.environment, **ENVIRONMENT, "PATH": path}, "timeout": 200}
        counts = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, **words).stdout)["counts"]  # type: ignore[call-overload]
        assert counts["interrupted"] + counts["cancelled"] + counts["failed"] == 0, counts
        with patch.context() as here:
            here.setenv("PATH", path)
            assert "submitted again" not in watch(sweep)
        sweep.wait_for_end(200)
        past = check_once(sweep, ended)
        assert [len(claims_of) for claims_of in past] == [1] * ended
        sweep.wait("the accounting", lambda count=ended: len(ever_submitted(sweep)) >= count, 60)
        assert len(ever_submitted(sweep)) == ended
        assert sum(s.size for s in Submission.all_of(sweep.sweep) if s.job) == ended
    made = [line.split()[0] for line in log.read_text().splitlines()]
    befallen: Counter[str] = Counter(kind for number in range(len(made)) if (kind := flaky_slurm.kind_of(seed, number)))
    figures: dict[str, object] = {"calls": len(made), "by_client": Counter(made), "faults": befallen.total(), "by_kind": befallen}
    print(
        json.dumps(
            {**figures, "seconds": round(time.monotonic() - began), "completed": ended, "doubled": len(ever_submitted(sweep)) - ended}
        )
    )
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
