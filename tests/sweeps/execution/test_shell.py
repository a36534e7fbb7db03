"""A sweep on a real Slurm from a shell that means otherwise, within an allocation, at a site that prints banners."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from sweeps.state.submission import Submission
from tests.support.shell import SHELL, put_banners
from tests.support.slurm_bench import ROOT, SweepOnSlurm, needs_slurm
from tests.support.slurm_cluster import SlurmCluster

pytestmark = [needs_slurm, pytest.mark.slow, pytest.mark.xdist_group("slurm-2")]
# Slurm's commands obey these, and none of them is the profile's wish.
OWN = {k: v for k, v in SHELL.items() if not k.startswith(("SLURM_JOB", "SLURMD", "SLURM_MEM"))} | {
    "SBATCH_PARTITION": "other",
    "SBATCH_OUTPUT": "/dev/null",
    "SBATCH_WAIT": "1",
    "SBATCH_MEM_PER_CPU": "7",
    "SLURM_TIMELIMIT": "1",
    "UNNAMED": "1",
    "NAMED": "2",
}


def in_shell(cluster: SlurmCluster, banners: Path, *command: str) -> str:
    """Run a command in an allocation with memory per core, with that shell's variables; return what it prints."""
    inner = ["env", *(f"{k}={v}" for k, v in OWN.items()), f"PATH={banners}:{cluster.environment['PATH']}", *command]
    line = ["salloc", "--quiet", "--account=proj", "--partition=gpu", "--mem-per-cpu=1000", "--ntasks=1", *inner]
    done = subprocess.run(line, cwd=ROOT, env=cluster.environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_sweep_goes_as_its_profile_says(cluster: SlurmCluster, tmp_path: Path) -> None:
    banners = put_banners(tmp_path / "bin", "before")
    sweep = SweepOnSlurm(cluster, tmp_path / "runs", ranks=1, held=False)
    write = f"setup=['env > {tmp_path}/script', 'srun env > {tmp_path}/step']"
    out = in_shell(cluster, banners, *sweep.line("one", "--detach", "epochs=1", write, "export=[NAMED]"))
    assert "submitted job " in out
    (made,) = Submission.all_of(sweep.sweep)
    (job,) = sweep.jobs()
    assert job.startswith(f"{made.job}_0:")
    shown = cluster.run("scontrol", "show", "job", made.job)
    for fact in ("Account=proj", "Partition=gpu", "TimeLimit=00:30:00", "MinMemoryNode=8000M"):
        assert fact in shown
    sweep.wait_for_end(120)
    assert "1 completed of 1" in sweep.ask("status")
    for file in ("script", "step"):
        there = dict(re.findall(r"^(\w+)=(.*)$", (tmp_path / file).read_text(), re.M))
        assert there["NAMED"] == "2"
        assert "UNNAMED" not in there
        assert not {k for k, v in OWN.items() if k != "NAMED" and there.get(k) == v}
        assert (there["SLURM_MEM_PER_NODE"], there.get("SLURM_MEM_PER_CPU")) == ("8000", None)
        assert there["PATH"].startswith(str(banners))
    assert "OMP_NUM_THREADS" not in there  # set after `setup`


@pytest.mark.nightly
@pytest.mark.parametrize("banner", ["after", "on the same line", "no text"])
def test_preflight_sends_its_job_under_a_banner(banner: str, cluster: SlurmCluster, tmp_path: Path) -> None:
    banners = put_banners(tmp_path / "bin", banner)
    line = [sys.executable, "-m", "jobs.preflight", "--cluster", "test_cluster", "--on-node", "--runs-dir", str(tmp_path)]
    out = in_shell(cluster, banners, *line, "ranks_per_trial=1", "cores_per_trial=1")
    assert re.search(r"^ok +node: gpu0\d: torch", out, re.M), out
