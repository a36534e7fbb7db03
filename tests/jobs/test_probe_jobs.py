"""Jobs that score runs later, on sites that allow little; what Slurm would say is played here."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from cnnjepa.run.folder import RunFolder
from jobs import preflight, probe
from jobs.cluster import ClusterProfile
from jobs.config import compose_job
from jobs.preflight import Finding
from jobs.probe import Request, Work
from jobs.slurm import limits
from jobs.slurm import queue as slurm
from jobs.slurm.nodes import Fault, FaultKind, Nodes
from jobs.slurm.queue import SlurmError
from jobs.slurm.sbatch import Array, render

CLUSTER = compose_job(["cluster=test_cluster"]).cluster
NODES = "gpu01|gpu*|idle\ngpu02|gpu*|idle\ngpu03|gpu*|idle\n"


@dataclass
class Site:
    """A Slurm that notes what is submitted."""

    arrays: int = 1001
    queue: str = ""
    refusal: str = ""  # of all jobs after the first
    checked: list[Array] = field(default_factory=list)
    made: list[tuple[ClusterProfile, Array]] = field(default_factory=list)

    def ask(self, command: list[str], patience_seconds: float = 0.0) -> str:
        if command[0] == "sacctmgr":
            raise SlurmError("sacctmgr: no accounting")
        return {"scontrol": f"MaxArraySize = {self.arrays}\n", "squeue": self.queue, "sinfo": NODES}[command[0]]

    def check(self, cluster: ClusterProfile, array: Array) -> list[Finding]:
        self.checked.append(array)
        return []

    def submit(self, cluster: ClusterProfile, array: Array) -> str:
        if self.refusal and self.made:
            raise SlurmError(self.refusal)
        self.made.append((cluster, array))
        return str(100 + len(self.made))


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Site:
    made = Site()
    for module in (slurm, limits):
        monkeypatch.setattr(module, "ask", made.ask)
    monkeypatch.setattr(preflight, "check_request", made.check)
    monkeypatch.setattr(probe, "submit", made.submit)
    monkeypatch.setattr(probe, "has_slurm", lambda: True)
    monkeypatch.setattr(probe.snapshot, "take", lambda folder, changes: folder)
    monkeypatch.setattr(probe, "examined", lambda request, path: Work(RunFolder(path), None, []))
    return made


@pytest.fixture
def score(tmp_path: Path) -> Callable[..., int]:
    """The command for five runs of a sweep."""
    (tmp_path / "sweep.json").touch()
    request = Request([tmp_path / "trials" / f"r{i}" for i in range(5)], {}, 1, "cpu", "")
    free = replace(CLUSTER, max_parallel=0)
    return lambda dry_run=False, **profile: probe.submit_jobs(request, tmp_path, replace(free, **profile), dry_run)


def shared_out(site: Site) -> list[list[str]]:
    """Return the runs of each task that was submitted."""
    found = []
    for _, array in site.made:
        asked = Request.load(Path(array.argument))
        assert asked.jobs == array.size
        found += [[run.name for run in asked.runs[number :: asked.jobs]] for number in range(array.size)]
    return found


def test_the_runs_are_shared_by_the_tasks_of_one_array(site: Site, score: Callable[..., int]) -> None:
    assert score(max_parallel=2) == 0
    assert [(array.size, array.throttle) for _, array in site.made] == [(2, 2)]
    assert shared_out(site) == [["r0", "r2", "r4"], ["r1", "r3"]]


@pytest.mark.parametrize("arrays", [0, 1])
def test_without_arrays_they_are_shared_by_single_jobs(arrays: int, site: Site, score: Callable[..., int]) -> None:
    site.arrays = arrays
    assert score(max_parallel=2) == 0
    assert shared_out(site) == [["r0", "r2", "r4"], ["r1", "r3"]]
    assert len({array.name for _, array in site.made}) == 2
    assert all("--array" not in render(cluster, array) for cluster, array in site.made)
    assert [array.throttle for array in site.checked] == [0]


@pytest.mark.parametrize("arrays", [1, 1001])
def test_no_more_jobs_are_submitted_than_may_be_queued(arrays: int, site: Site, score: Callable[..., int]) -> None:
    site.arrays, site.queue = arrays, "7|RUNNING|0|None|gpu01|x|\n"
    assert score(max_queued=4) == 0
    assert sorted(run for runs in shared_out(site) for run in runs) == [f"r{i}" for i in range(5)]
    assert len(shared_out(site)) == 3
    with pytest.raises(ValueError, match="must be at most 1; got 1"):
        score(max_queued=1)


def test_the_jobs_keep_off_the_nodes_that_the_sweep_avoids(site: Site, score: Callable[..., int], tmp_path: Path) -> None:
    nodes = Nodes(tmp_path / "nodes")
    nodes.record(Fault("r0", 1, "7_0", ["gpu02"], FaultKind.node, "ECC error", nodes._clock()))
    assert score(sbatch={"exclude": "gpu09"}) == 0
    assert [cluster.sbatch["exclude"] for cluster, _ in site.made] == ["gpu09,gpu02"]


def test_a_refusal_half_way_names_what_was_submitted(site: Site, score: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    site.arrays, site.refusal = 1, "sbatch: error: QOSMaxSubmitJobPerUserLimit"
    assert score() == 1
    assert capsys.readouterr().out.splitlines()[1:] == [
        "4 of 5 jobs are not submitted, and their runs not scored: sbatch: error: QOSMaxSubmitJobPerUserLimit; "
        "run the command again when jobs 101 have ended"
    ]


def test_a_dry_run_shows_the_single_job_and_asks_for_no_queue(
    site: Site, score: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    site.arrays = 1
    assert score(dry_run=True) == 0
    out = capsys.readouterr().out
    assert out.startswith("5 runs to score in 5 jobs\n\n#!/bin/bash")
    assert "--array" not in out
    assert site.made == site.checked == []
