"""One node of three is bad, on a real Slurm: no trial pays for it, and the node is named and avoided."""

import json
import shlex
import sys
from pathlib import Path

import pytest

from sweeps.state import claims
from tests.support.slurm_bench import ROOT, SweepOnSlurm, needs_slurm
from tests.support.slurm_cluster import SlurmCluster

pytestmark = [needs_slurm, pytest.mark.slow, pytest.mark.xdist_group("slurm-3")]

SCRIPT = ROOT / "tests" / "support" / "many_sweep.py"
# Python reads it at its start: whatever opens a run's records on the bad node ends so.
BAD = """
import os, signal, sys
sys.path.append({support!r})
if os.environ.get("SLURMD_NODENAME") == {node!r}:
    from cnnjepa.run.folder import RunFolder

    def broken(self, *rest):
        {how}

    RunFolder.open_metrics = broken
"""
ODD = 'raise RuntimeError(f"the flux of {os.getpid()} is odd")'
ECC = 'raise RuntimeError("CUDA error: uncorrectable ECC error encountered")'
DIES = "os.kill(os.getpid(), signal.SIGKILL)"
NONE = "pass"
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
        (there / "sitecustomize.py").write_text(BAD.format(support=str(SCRIPT.parent), node=node, how=how))
        words = f"env PYTHONPATH={there}:{ROOT} {sys.executable}"
        self.sweep.submit(str(trials), f"cluster.python={shlex.quote(words)}", *arguments, script=SCRIPT)

    def end(self) -> list[dict[str, object]]:
        """The results, in the order of the trials."""
        self.sweep.wait_for_end()
        return [json.loads((d / "result.json").read_text()) for d in self.sweep.trial_dirs()]

    def lost(self, node: str = "gpu01") -> int:
        """The claims that ended on a node."""
        return sum(c.slurm is not None and c.slurm.node == node for d in self.sweep.trial_dirs() for c in claims.history(d))

    def said(self) -> dict[str, object]:
        found: dict[str, object] = json.loads(self.sweep.ask("nodes", "--json"))
        return found


@pytest.fixture
def bad(cluster: SlurmCluster, tmp_path: Path) -> Bad:
    return Bad(cluster, tmp_path)


def check(bad: Bad, trials: int) -> None:
    """All complete, at most 3 starts are lost, and the node is named."""
    results = bad.end()
    assert [r["status"] for r in results] == ["completed"] * trials, results
    assert bad.lost() <= 3
    assert bad.said()["avoided"] == ["gpu01"]
    assert any("node gpu01 is avoided" in line for line in bad.sweep.status()["nodes"])


def test_a_node_that_breaks_whatever_computes_there(bad: Bad) -> None:
    bad.submit(5, ODD)
    check(bad, 5)


@pytest.mark.nightly
@pytest.mark.parametrize("how", [ODD, ECC, DIES])
def test_twelve_trials_lose_three_starts_at_most(bad: Bad, how: str) -> None:
    bad.submit(12, how)
    check(bad, 12)


@pytest.mark.nightly
def test_a_node_whose_setup_fails(bad: Bad) -> None:
    bad.submit(12, NONE, f"cluster.setup={SETUP}")
    check(bad, 12)
    assert bad.lost() == 0
    assert [f["kind"] for f in bad.said()["faults"]] == ["setup"]  # type: ignore[attr-defined]
