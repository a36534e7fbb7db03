"""A sweep on a real Slurm whose profile names a folder of each node: copied once, also when the job is requeued before it could read."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cnnjepa.data.datasets import DEBIAN_FASHION
from jobs.staging import own_folder
from sweeps.state import claims
from tests.support.slurm_bench import ROOT, SweepOnSlurm, needs_slurm
from tests.support.slurm_cluster import SlurmCluster
from tests.support.staging import assert_same_files, child, copied_bytes, end, set_of, write_manifest

pytestmark = [
    needs_slurm,
    pytest.mark.slow,
    pytest.mark.xdist_group("slurm-2"),
    pytest.mark.skipif(not DEBIAN_FASHION.is_dir(), reason="Debian's dataset-fashion-mnist is not installed"),
]


def test_a_job_stages_once_for_its_ranks_and_can_be_requeued_while_it_waits(cluster: SlurmCluster, tmp_path: Path) -> None:
    source, scratch = tmp_path / "fashion", tmp_path / "node"
    shutil.copytree(DEBIAN_FASHION, source)
    (source / "file-0").write_bytes(os.urandom(100_000))
    (source / "file-1").write_bytes(os.urandom(100_000))
    write_manifest(source)
    scratch.mkdir()
    data = ["data=fashion_mnist", f"data.root={source}", f"local_scratch={scratch}"]
    line = [sys.executable, "-m", "jobs.preflight", "--cluster", "test_cluster", "--on-node", "--runs-dir", str(tmp_path), *data]
    looked = subprocess.run(line, cwd=ROOT, env=cluster.environment, capture_output=True, text=True, timeout=200, check=False)
    assert looked.returncode == 0, looked.stdout + looked.stderr
    assert f"of {source} to {scratch} once; it fits" in looked.stdout

    copier = child(source, scratch, until=1)  # of another job on the node; it stands still
    assert copier.stdout is not None
    copier.stdout.readline()
    copier.stdout.readline()
    sweep = SweepOnSlurm(cluster, tmp_path / "runs", held=False)
    sweep.submit("one", "epochs=3", *data)

    def said() -> str:
        """What all processes have said, each line once: an attempt's own log is train.log under another name."""
        return "".join(p.read_text() for p in sweep.path.rglob("*.log") if not re.fullmatch(r"train\.\d+\.log", p.name))

    sweep.wait("all ranks to wait", lambda: said().count("waiting for the process that copies") == 2)
    (folder,) = sweep.trial_dirs()
    job = sweep.job_of(folder)
    cluster.run("scontrol", "requeue", job)
    sweep.wait("the next start", lambda: said().count("waiting for the process that copies") == 4)
    assert list(folder.glob("checkpoints/*.pt")) == []
    end(copier)
    sweep.wait_for_end()
    assert [c.slurm.restart for c in claims.history(folder) if c.slurm] == [0, 1]
    assert len(copied_bytes(said())) == 1
    assert_same_files(source, own_folder(str(scratch)) / set_of(source).key)
