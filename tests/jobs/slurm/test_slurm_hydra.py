"""hydra-submitit-launcher with a cluster profile's values: on a real Slurm, requeued in the middle, and on this machine."""

import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.support.slurm_bench import needs_slurm
from tests.support.slurm_cluster import SlurmCluster
from tests.support.tiny import OVERRIDES

ROOT = Path(__file__).parents[3]


def line(runs: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "jobs.pretrain", "-m", f"cluster.runs_dir={runs}", *OVERRIDES, *more]


def held(cluster: SlurmCluster, run: Path) -> psutil.Process:
    """Let rank 0 of a run that has begun stand still, and with it the run; it is the one that writes its records."""
    for pid in (p for name in cluster.names for p in cluster.processes_of_node(name)):
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            if str(run / "metrics.jsonl") in {f.path for f in process.open_files()}:
                process.suspend()
                return process
    raise AssertionError(f"nobody writes {run}")


@needs_slurm
@pytest.mark.slow
@pytest.mark.xdist_group("slurm-2")
def test_a_grid_on_slurm_takes_the_profile_and_survives_a_requeue(cluster: SlurmCluster, tmp_path: Path) -> None:
    grid = [
        "hydra/launcher=submitit_slurm",
        "cluster=test_cluster",
        "optimizer.lr=0.003,0.01",
        "epochs=30",
        "cluster.ranks_per_trial=2",
        "cluster.cores_per_trial=2",
    ]
    child = subprocess.Popen(
        line(tmp_path, *grid), cwd=ROOT, env=cluster.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )

    standing: dict[Path, psutil.Process] = {}

    def both_begun() -> bool:
        for records in tmp_path.glob("single/*/metrics.jsonl"):
            if records.parent not in standing and '"step"' in records.read_text():
                standing[records.parent] = held(cluster, records.parent)
        return len(standing) == 2

    cluster.wait("two runs under way", both_begun, 300)
    job = cluster.run("squeue", "-h", "-r", "-t", "R", "-o", "%i").split()[0]
    shown = cluster.run("scontrol", "show", "job", job)
    for fact in ("Account=proj", "Partition=gpu", "Requeue=1", "NumTasks=2", "TresPerNode=gres:gpu:4", "TimeLimit=00:30:00"):
        assert fact in shown
    again = subprocess.run(
        line(tmp_path, *grid), cwd=ROOT, env=cluster.environment, text=True, capture_output=True, timeout=60, check=False
    )
    assert again.returncode == 2
    assert "a grid must be queued only once; got the grid of job" in again.stderr
    cluster.run("scontrol", "requeue", job)
    for process in standing.values():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()
    out, _ = child.communicate(timeout=300)
    assert child.returncode == 0, out
    results = [json.loads(p.read_text()) for p in tmp_path.glob("single/*/result.json")]
    assert [r["status"] for r in results] == ["completed"] * 2
    assert sorted(r["resumes"] for r in results) == [0, 1]
    assert len(re.findall("^completed: ", out, re.M)) == 2


@pytest.mark.slow
def test_a_grid_through_submitit_on_this_machine(tmp_path: Path) -> None:
    grid = ["hydra/launcher=submitit_local", "optimizer.lr=0.003,0.01", "epochs=2"]
    done = subprocess.run(line(tmp_path, *grid), cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall("^completed: ", done.stdout, re.M)) == 2


@pytest.mark.slow
def test_a_grid_with_a_mistake_submits_nothing(tmp_path: Path) -> None:
    grid = ["hydra/launcher=submitit_slurm", "cluster=komondor", "optimizer.lr=0.003,0.01"]
    done = subprocess.run(line(tmp_path, *grid), cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.strip() == "error: cluster.account must be given for cluster komondor; got none: add account=VALUE"
