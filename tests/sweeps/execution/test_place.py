"""Workers on good and bad nodes, without Slurm: who pays for a fault, what is opened again, and what a worker does next."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cnnjepa.run.folder import HopelessError, RunFolder, RunResult, RunStatus
from cnnjepa.run.ranks import Ranks
from jobs import run
from jobs.cli import MOVED
from jobs.config import compose_job
from jobs.slurm import nodes
from sweeps import __main__ as command
from sweeps.execution import worker_main
from sweeps.execution.worker_ranks import WorkerOnRanks
from sweeps.spec.sweep import ScaleName, build_trials
from sweeps.state import claims
from sweeps.state.claims import SlurmStart
from sweeps.state.folder import Sweep
from sweeps.state.trial_state import TrialState
from sweeps.state.view import View
from tests.support.tiny_sweep import sweep as tiny_sweep

CLUSTER = compose_job(["cluster=local"]).cluster
NODES = ("a", "b", "c")


class Site:
    """A sweep of six trials, and workers on nodes of our own, in jobs that have ended once they return."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        spec = tiny_sweep()
        self.sweep = Sweep.of(spec, ScaleName.smoke, build_trials(spec, spec.smoke, 2, "local", []), folder / "tiny_sweep-smoke")
        self.sweep.write()
        self.sweep.nodes.know(NODES, 1)
        self.patch, self.jobs = monkeypatch, 0
        self.faults: dict[str, Callable[[str], BaseException | None]] = {}
        monkeypatch.setattr(run.provenance, "record", lambda folder: None)
        monkeypatch.setattr(run, "task_of", lambda config: self)

    # The trainer.

    name = "cnnjepa.task"

    def get(self, config: object, what: str, default: object) -> object:
        return default

    def train(self, config: object, folder: RunFolder, stop: object, claim: int, judge: object) -> RunResult:
        error = self.faults.get(self.node, lambda trial: None)(folder.path.name)
        if error is not None:
            raise error
        folder.write_result(RunResult(RunStatus.completed, claim=claim))
        found = folder.result()
        assert found is not None
        return found

    def work(self, node: str, job: str = "") -> int:
        """One worker on a node, in a job of its own."""
        self.node, self.jobs = node, self.jobs + 1
        job = job or f"{self.jobs}"
        for name, value in {"SLURM_JOB_ID": job, "SLURM_JOB_NODELIST": node, "SLURMD_NODENAME": node}.items():
            self.patch.setenv(name, value)
        start = SlurmStart("mini", job, 0, node, 1.0, "/none", "/code")
        return WorkerOnRanks(View(self.sweep), CLUSTER, Ranks(0, 1, None), lambda: False, start.driver, start).run()  # type: ignore[arg-type]

    def states(self) -> list[str]:
        return [s.name for s in View(self.sweep).states().values()]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    return Site(tmp_path, monkeypatch)


def odd(trial: str) -> Exception:
    return RuntimeError(f"the flux of {trial} is odd")


def test_a_fault_of_a_node_moves_the_job_and_ends_no_trial(site: Site) -> None:
    site.faults["a"] = lambda trial: OSError(116, "Stale file handle")
    assert site.work("a") == MOVED
    assert site.states() == ["interrupted", *["waiting"] * 5]
    assert site.work("a") == MOVED, "nothing begins there"
    assert len(claims.history(site.sweep.trial_dir(site.sweep.trials[0]))) == 1
    assert site.work("b") == 0
    assert site.states()[0] == "completed"
    assert list(site.sweep.nodes.avoided()) == ["a"]


def test_a_second_trial_that_fails_there_opens_the_first_again_and_another_worker_takes_it_up(site: Site) -> None:
    site.faults["a"] = odd
    assert site.work("a") == 0
    assert site.states()[0] == "failed"
    watching = View(site.sweep)
    assert watching.states()[site.sweep.trials[0].signature] is TrialState.failed
    assert site.work("a") == MOVED
    assert site.states()[:2] == ["interrupted"] * 2
    assert watching.states()[site.sweep.trials[0].signature] is TrialState.interrupted, "who watches sees it too"
    for node in ("b", "c", "b", "c"):  # four jobs for the six trials that are left
        assert site.work(node) == 0
    assert site.states() == ["completed"] * 6


@pytest.mark.parametrize("code", [None, 0, 200, "no such file"])
def test_a_run_that_exits_unasked_is_a_death_for_slurm_too(
    site: Site, code: object, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    said = f"train must return or raise unless it was asked to stop; got sys.exit({'' if code is None else repr(code)})"
    statuses: list[int] = []
    site.faults["a"] = lambda trial: SystemExit(code)
    monkeypatch.setattr(worker_main, "run_rank", lambda *_: site.work("a"))
    monkeypatch.setattr(os, "_exit", statuses.append)
    monkeypatch.setattr(sys, "argv", ["worker_main", "submission"])
    worker_main.main()
    assert statuses == [1]
    assert capfd.readouterr().err == f"error: {said}\n"
    folder = site.sweep.trial_dir(site.sweep.trials[0])
    assert (folder / "claim" / "000001.crashed").exists()
    assert (folder / "log" / "train.log").read_text().endswith(f"{said}\n")
    assert site.states()[0] == "interrupted"


def test_an_error_that_follows_the_trial_ends_it(site: Site) -> None:
    bad = site.sweep.trials[0].signature
    site.faults = dict.fromkeys(NODES, lambda trial: KeyError("its own") if trial == bad else None)
    assert site.work("a") == 0
    assert site.work("a") == 0
    assert site.states()[:2] == ["failed", "completed"]
    assert site.sweep.nodes.avoided() == {}


def test_a_fault_of_a_node_that_follows_the_trial_ends_it_too(site: Site) -> None:
    bad = site.sweep.trials[0].signature
    site.faults = dict.fromkeys(NODES, lambda trial: RuntimeError("NVML: no") if trial == bad else None)
    assert site.work("a", job="7") == MOVED
    assert site.work("b", job="8") == 0
    assert site.states()[0] == "failed"
    assert site.sweep.nodes.avoided() == {}


def test_the_program_pays_for_itself_whatever_its_text(site: Site) -> None:
    site.faults["a"] = lambda trial: HopelessError("loss nan; NVML")
    assert (site.work("a"), site.work("a")) == (0, 0)
    assert site.states()[:2] == ["failed"] * 2
    assert site.sweep.nodes.live() == []


@pytest.mark.parametrize("known", [("a",), ()])
def test_without_another_node_a_fault_ends_the_trial(site: Site, known: tuple[str, ...]) -> None:
    (site.sweep.nodes.folder / "known.json").unlink()
    site.sweep.nodes.know(known, 1)
    site.faults["a"] = lambda trial: OSError(116, "Stale file handle")
    assert site.work("a") == 0
    assert site.states()[0] == "failed"


def test_new_jobs_exclude_what_is_avoided_beside_what_the_profile_excludes(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes.slurm, "nodes_of", lambda partition, nodelist: ["a", "b", "c", "x1", "x2"])
    profile = replace(CLUSTER, sbatch={"exclude": "x[1-2]"})
    assert nodes.off_bad_nodes(profile, site.sweep.nodes) == profile
    assert nodes.off_bad_nodes(CLUSTER, site.sweep.nodes) == CLUSTER
    site.faults["a"] = lambda trial: OSError(116, "Stale file handle")
    site.work("a")
    assert nodes.off_bad_nodes(profile, site.sweep.nodes).sbatch["exclude"] == "x[1-2],a"
    assert site.sweep.nodes.total == 3
    assert nodes.off_bad_nodes(CLUSTER, site.sweep.nodes).sbatch == {"exclude": "a"}
    whole = replace(CLUSTER, nodes_per_trial=5)  # an allocation of all nodes
    assert nodes.off_bad_nodes(whole, site.sweep.nodes) == whole


def test_the_command_lists_and_clears(site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def typed(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sweeps", "nodes", str(site.sweep.path), *words])
        status = command.main()
        return status, *capsys.readouterr()

    assert typed()[1] == "no node is avoided\n"
    site.faults["a"] = lambda trial: OSError(116, "Stale file handle")
    site.work("a")
    capsys.readouterr()
    said = typed()[1]
    assert "node a is avoided until" in said
    assert "Stale file handle" in said
    assert json.loads(typed("--json")[1])["avoided"] == ["a"]
    status, _, error = typed("--clear", "b")
    assert (status, error) == (2, "error: --clear must name nodes that have failed lately; got b: choose among a\n")
    assert typed("--clear", "a") == (0, "no node is avoided\n", "")
    assert site.work("a") == MOVED, "it fails again"
