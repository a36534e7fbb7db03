"""One node of three is bad, on a real Slurm: no trial pays for it, and the node is named and avoided."""

import json
import shlex
import sys
from pathlib import Path

import pytest

from jobs.slurm.nodes import FaultKind, Nodes
from sweeps.state import claims
from tests.support.bad_node import ODD, broken_at_start
from tests.support.slurm_bench import ROOT, SweepOnSlurm, needs_slurm
from tests.support.slurm_cluster import SlurmCluster

pytestmark = [needs_slurm, pytest.mark.slow, pytest.mark.xdist_group("slurm-3")]

SCRIPT = ROOT / "tests" / "support" / "many_sweep.py"
ECC = 'raise RuntimeError("CUDA error: uncorrectable ECC error encountered")'
DIES = "os.kill(os.getpid(), signal.SIGKILL)"
NONE = "pass"
BACKWARD = """
import os
if os.environ.get("SLURMD_NODENAME") == "gpu02":
    import torch

    def broken(self, *rest, **named):
        raise RuntimeError(f"the flux of {os.getpid()} is odd")

    torch.Tensor.backward = broken
"""
SETUP = '["[ $SLURMD_NODENAME != gpu01 ] || exit 3"]'


class Bad:
    """A sweep of trials of a second, on three nodes of which `node` is bad."""

    def __init__(self, cluster: SlurmCluster, folder: Path) -> None:
        self.sweep = SweepOnSlurm(cluster, folder / "runs", held=False)
        self.sweep.path = folder / "runs" / "many-smoke"
        self.sweep.profile = ["ranks_per_trial=1", "cores_per_trial=1"]
        self.folder = folder

    def submit(self, trials: int, how: str, *arguments: str, node: str = "gpu01") -> None:
        """Submit, with a Python whose runs end so on `node`."""
        there = self.folder / "python"
        there.mkdir()
        (there / "sitecustomize.py").write_text(broken_at_start(how, node, (str(SCRIPT.parent),)))
        words = f"env PYTHONPATH={there} {sys.executable}"
        # The others take longer, so that the bad node gets the next trial too.
        self.sweep.submit(str(trials), "pause_seconds=1.5", f"cluster.python={shlex.quote(words)}", *arguments, script=SCRIPT)

    def end(self) -> list[dict[str, object]]:
        """The results, in the order of the trials."""
        self.sweep.wait_for_end()
        return [json.loads((d / "result.json").read_text()) for d in self.sweep.trial_dirs()]

    def lost(self, node: str = "gpu01") -> int:
        """The claims that ended on a node."""
        return sum(c.slurm is not None and c.slurm.node == node for d in self.sweep.trial_dirs() for c in claims.history(d))

    @property
    def nodes(self) -> Nodes:
        return self.sweep.sweep.nodes


@pytest.fixture
def bad(cluster: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bad:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))  # of the trainer
    return Bad(cluster, tmp_path)


def check(bad: Bad, trials: int, begun: bool = True) -> None:
    """All complete, at most 3 starts are lost, and the node is named; `begun` is whether trials begin there at all."""
    results = bad.end()
    assert [r["status"] for r in results] == ["completed"] * trials, results
    assert begun <= bad.lost() <= 3 * begun
    assert list(bad.nodes.avoided()) == ["gpu01"]
    assert "node gpu01 is avoided" in bad.nodes.lines()[0]


def test_a_node_that_breaks_whatever_computes_there(bad: Bad) -> None:
    bad.submit(4, ODD)
    check(bad, 4)


@pytest.mark.nightly
@pytest.mark.parametrize("how", [ODD, ECC, DIES])
def test_twelve_trials_lose_three_starts_at_most(bad: Bad, how: str) -> None:
    bad.submit(12, how)
    check(bad, 12)


@pytest.mark.nightly
def test_a_node_whose_setup_fails(bad: Bad) -> None:
    bad.submit(12, NONE, f"cluster.setup={SETUP}")
    check(bad, 12, begun=False)
    assert [f.kind for f in bad.nodes.live()] == [FaultKind.setup]


@pytest.mark.nightly
def test_workers_of_an_allocation_are_placed_on_other_nodes(bad: Bad) -> None:
    bad.sweep.profile += ["gpus_per_trial=1", "gres=gpu:1"]
    bad.submit(8, ODD, "--backend", "allocation", "--nodes", "3", "--trials-per-node", "1")
    results = bad.end()
    assert [r["status"] for r in results] == ["completed"] * 8
    assert 1 <= bad.lost() <= 3
    assert "node gpu01 is suspect" in bad.nodes.lines()[0], "the allocation has no other node; within it the node is avoided"


@pytest.mark.nightly
def test_of_two_nodes_of_one_trial_the_bad_one_is_named(cluster: SlurmCluster, tmp_path: Path) -> None:
    sweep = SweepOnSlurm(cluster, tmp_path / "runs", held=False)
    sweep.profile = ["nodes_per_trial=2", "ranks_per_trial=2", "cores_per_trial=2", "gpus_per_trial=8"]
    (tmp_path / "sitecustomize.py").write_text(BACKWARD)
    words = f"env PYTHONPATH={tmp_path}:{ROOT} {sys.executable}"
    sweep.submit(f"cluster.python={shlex.quote(words)}", "epochs=1")
    sweep.wait_for_end()
    folders = sweep.trial_dirs()
    assert [json.loads((d / "result.json").read_text())["status"] for d in folders] == ["completed"] * 3
    assert list(sweep.sweep.nodes.avoided()) == ["gpu02"]
    assert sum(len(claims.history(d)) for d in folders) <= 3 + 3
