"""Runs that hang on a real Slurm: each rank's stack is in the log, and the run starts again in place."""

import json
import os
import shlex
import sys
from pathlib import Path

import pytest

from sweeps.state import claims
from tests.support.slurm_bench import ROOT, STEPS, SweepOnSlurm, needs_slurm
from tests.support.slurm_cluster import SlurmCluster

pytestmark = [needs_slurm, pytest.mark.slow, pytest.mark.xdist_group("slurm-3")]

# Python reads it at its start. At the 12th backward pass the rank hangs, once.
HANGS = """
import os, signal, sys, time
if "SLURM_PROCID" in os.environ and "sweeps.execution.worker_main" in " ".join(sys.orig_argv):
    import torch

    backward, passes = torch.Tensor.backward, []

    def slow(self, *rest, **named):
        passes.append(1)
        if len(passes) == 12 and os.environ["SLURM_PROCID"] == {rank!r} and os.environ["SLURMD_NODENAME"] in {nodes!r}:
            if {always} or not os.path.exists({mark!r}):
                open({mark!r}, "w").close()
                {how}
        return backward(self, *rest, **named)

    torch.Tensor.backward = slow
"""
NODES = "gpu01 gpu02 gpu03"
STOPPED, COLLECTIVE = "os.kill(os.getpid(), signal.SIGSTOP)", "time.sleep(10000)"
FILE_SYSTEM = "open({fifo!r}).read()"  # nobody writes there: the call does not return
LOADER = """
import os, sys, time
if "SLURM_PROCID" in os.environ and "sweeps.execution.worker_main" in " ".join(sys.orig_argv):
    from torch.utils.data import _utils

    loop = _utils.worker._worker_loop

    def hanging(*rest, **named):
        try:
            os.close(os.open({mark!r}, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return loop(*rest, **named)
        fetch = _utils.fetch._MapDatasetFetcher.fetch
        count = []

        def slow(self, *more):
            count.append(1)
            time.sleep(10000 if len(count) > 3 else 0)
            return fetch(self, *more)

        _utils.fetch._MapDatasetFetcher.fetch = slow
        return loop(*rest, **named)

    _utils.worker._worker_loop = hanging
"""


class Hanging:
    """One trial of two ranks that hangs; 15 seconds without a step count as a hang, which a crowded machine does not take for one."""

    def __init__(self, cluster: SlurmCluster, folder: Path) -> None:
        self.sweep, self.folder = SweepOnSlurm(cluster, folder / "runs", ranks=2, held=False), folder
        (folder / "python").mkdir()
        os.mkfifo(folder / "fifo")

    def submit(self, text: str, *arguments: str, trials: str = "one") -> None:
        (self.folder / "python" / "sitecustomize.py").write_text(text)
        words = f"env PYTHONPATH={self.folder / 'python'}:{ROOT} {sys.executable}"
        self.sweep.submit(*trials.split(), f"cluster.python={shlex.quote(words)}", "hang_minutes=0.25", *arguments)

    def at_step(self, how: str, rank: int, nodes: str = NODES, always: str = "False", **more: str) -> None:
        how, mark = how.format(fifo=str(self.folder / "fifo")), str(self.folder / "mark")
        self.submit(HANGS.format(rank=str(rank), nodes=nodes, mark=mark, always=always, how=how), **more)

    def check(self) -> str:
        """The run has gone on in place, from its last checkpoint; return the job's log."""
        self.sweep.wait_for_end()
        (folder,) = self.sweep.trial_dirs()
        result = json.loads((folder / "result.json").read_text())
        assert (result["status"], result["step"]) == ("completed", STEPS)
        past = claims.history(folder)
        assert [c.slurm.job for c in past if c.slurm] == [past[0].slurm.job] * 2, past  # type: ignore[union-attr]
        assert past[1].step > 0
        log = next((self.sweep.path / "log").glob("*.log")).read_text()
        assert "the run hangs" in log
        return log


@pytest.fixture
def hanging(cluster: SlurmCluster, tmp_path: Path) -> Hanging:
    return Hanging(cluster, tmp_path)


def stacks_of_a_step(log: str) -> int:
    return log.count(" in train_steps")


@pytest.mark.nightly
def test_a_rank_that_is_stopped(hanging: Hanging) -> None:
    hanging.at_step(STOPPED, 1)
    assert stacks_of_a_step(hanging.check()) == 2, "of both ranks"


@pytest.mark.nightly
@pytest.mark.parametrize(("how", "rank"), [(COLLECTIVE, 1), (COLLECTIVE, 0), (FILE_SYSTEM, 0), (FILE_SYSTEM, 1)])
def test_ranks_that_wait_for_another_one_and_for_a_file(hanging: Hanging, how: str, rank: int) -> None:
    hanging.at_step(how, rank)
    assert stacks_of_a_step(hanging.check()) == 2


@pytest.mark.nightly
def test_a_loader_process(hanging: Hanging) -> None:
    hanging.submit(LOADER.format(mark=str(hanging.folder / "mark")), "data.workers=1")
    hanging.check()


@pytest.mark.nightly
def test_a_second_hang_on_one_node_is_the_nodes(hanging: Hanging) -> None:
    hanging.at_step(COLLECTIVE, 1, nodes="gpu01", always="True")
    hanging.sweep.wait_for_end()
    (folder,) = hanging.sweep.trial_dirs()
    assert json.loads((folder / "result.json").read_text())["status"] == "completed"
    assert list(hanging.sweep.sweep.nodes.avoided()) == ["gpu01"]
    assert sum(c.slurm is not None and c.slurm.node == "gpu01" for c in claims.history(folder)) == 2


@pytest.mark.nightly
def test_a_node_on_which_every_second_trial_hangs(hanging: Hanging) -> None:
    (hanging.folder / "mark").touch()
    hanging.sweep.profile = ["ranks_per_trial=1", "cores_per_trial=1"]
    odd = "int(os.environ['SLURM_ARRAY_TASK_ID']) % 2"
    hanging.at_step(COLLECTIVE, 0, nodes="gpu01", always=odd, trials="--seeds 4")
    hanging.sweep.wait_for_end(380)
    folders = hanging.sweep.trial_dirs()
    assert [json.loads((d / "result.json").read_text())["status"] for d in folders] == ["completed"] * 12
    assert sum(len(claims.history(d)) for d in folders) <= 12 + 3
    assert set(hanging.sweep.sweep.nodes.avoided()) <= {"gpu01"}
