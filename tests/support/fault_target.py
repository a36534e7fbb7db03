"""Run a sweep that costs nothing, for faults: a trivial trainer, and workers in the command's own process; all else is real."""

import argparse
import csv
import functools
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cnnjepa.data.datasets import load_splits
from cnnjepa.run.files import SEAL
from cnnjepa.run.folder import RunFolder
from cnnjepa.run.identity import signature
from jobs import provenance, snapshot
from jobs.cluster import ClusterProfile
from sweeps.cli import local, run
from sweeps.cli import plan as plans
from sweeps.execution import monitor, rounds, worker
from sweeps.report import plots, tables
from sweeps.spec.sweep import SweepSpec
from sweeps.state.claims import Process
from sweeps.state.folder import Sweep
from tests.support import tiny_search, tiny_sweep
from tests.support.trivial import DONE, trivial_job

SPECS = {"sweep": replace(tiny_sweep.sweep(), configurations=tiny_sweep.CONFIGURATIONS[:2]), "search": tiny_search.SWEEP}
ARGUMENTS = {"sweep": ("--seeds", "1"), "search": ("--seeds", "1", "--max-trials", "2", "--sampler", "random", "--early-stopping", "none")}


class InProcess:
    """Stands in for LocalEngine: workers run in this process, one after the other."""

    unused_devices, parallel = 0, 1

    def __init__(self, sweep: Sweep, cluster: ClusterProfile, _code: Path | None = None) -> None:
        self.sweep, self.cluster = sweep, cluster

    lost_folder = ""

    def shared_line(self) -> str:
        return ""

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def close(self) -> None: ...

    def place(self, workers: int, silent: frozenset[Path]) -> list[str]:
        for _ in range(workers):
            worker.run_worker(self.sweep, self.cluster, Process.me().driver, lambda: False, silent)
        return []


def given(name: str, cluster: str) -> list[str]:
    return [
        "--cluster",
        cluster,
        "--scale",
        "smoke",
        "--name",
        f"tiny_{name}-smoke",
        *ARGUMENTS[name],
        *(["micro_batch_size=8"] if cluster != "local" else []),
    ]


@functools.cache
def planned(name: str, cluster: str) -> tuple[Sweep, ClusterProfile]:
    return plans.plan(SPECS[name], plans.parse(SPECS[name], ["--dry-run", *given(name, cluster)]))


@functools.cache
def digits() -> object:
    return load_splits(planned("sweep", "local")[0].trials[0].config.data)


def plan(spec: SweepSpec, asked: argparse.Namespace, _data: object) -> tuple[Sweep, ClusterProfile]:
    """As sweeps.cli.plan.plan, of which this asks once for all."""
    sweep, cluster = planned(next(name for name, known in SPECS.items() if known is spec), asked.cluster)
    return replace(sweep, path=asked.runs_dir / sweep.path.name, trials=list(sweep.trials), _next=[1]), cluster


def work(name: str, runs: Path, cluster: str = "local") -> Callable[[], int]:
    """The command."""
    return lambda: run.run(SPECS[name], ["--runs-dir", str(runs), "--detach", *given(name, cluster)])


def folder(name: str, runs: Path) -> Path:
    return runs / f"tiny_{name}-smoke"


def what_it_came_to(name: str, runs: Path) -> dict[str, str]:
    """All that a sweep ends with: its tables and what each run has recorded, less what tells the moment and the claim."""
    path = folder(name, runs)
    found = {view: (path / view).read_text() for view in ("results.csv", "summary.csv", "ablation.png", "sweep.json")}
    for trial in sorted((path / "trials").iterdir()):
        result = json.loads((trial / "result.json").read_text())
        del result["claim"], result[SEAL]
        found[trial.name] = (trial / "metrics.jsonl").read_text() + json.dumps(result) + signature(RunFolder(trial).config())
        found[f"{trial.name} files"] = " ".join(sorted(p.name for p in (trial / "checkpoints").iterdir()))
    return found


def rows(name: str, runs: Path) -> list[str]:
    with (folder(name, runs) / "results.csv").open() as file:
        return [line["signature"] for line in csv.DictReader(file)]


def repeated(runs: Path) -> int:
    """Steps that were computed more than once."""
    done = Counter((runs / DONE).read_text().splitlines())
    return sum(n - 1 for n in done.values())


def workers_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run workers one after the other in this process, without waits, git, or a process that writes the page."""
    monkeypatch.setattr(local, "LocalEngine", InProcess)
    monkeypatch.setattr(local, "workers_here", lambda _: 1)
    monkeypatch.setattr(local, "REFRESH_SECONDS", 0.2)
    monkeypatch.setattr(rounds, "REFRESH_SECONDS", 0.2)
    monkeypatch.setattr(worker, "_WAIT_SECONDS", 0.02)
    monkeypatch.setattr(provenance, "_git", lambda *_, **__: "")
    monkeypatch.setattr(snapshot, "_PARTS", ("pyproject.toml",))
    monkeypatch.setattr(monitor, "rebuild", lambda _: "")


def make_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes seconds and writes nothing is done once, or not at all."""
    for name in SPECS:
        planned(name, "local")
    digits()
    workers_in_process(monkeypatch)
    monkeypatch.setattr(run, "plan", plan)
    monkeypatch.setattr(worker, "run_job", trivial_job)
    monkeypatch.setattr(plots, "draw", lambda view, path: plots.write_atomic(path, tables.summary_csv(view)))
    monkeypatch.setattr("cnnjepa.data.datasets.load_splits", lambda _: digits())
