"""The sweeps of sweeps/, run in seconds: each configuration is planned, checked and claimed as ever; a stand-in makes up the numbers."""

import ast
import hashlib
import importlib
import io
import sys
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import pytest

from cnnjepa.data.datasets import load_splits
from cnnjepa.data_config import DataConfig
from cnnjepa.run.folder import RunFolder, RunResult, RunStatus, never, no_judge
from jobs import provenance
from jobs.cluster import JobSpec
from sweeps import __main__ as readers
from sweeps.cli import run as command
from sweeps.execution import worker
from sweeps.spec.sweep import SweepSpec
from tests.support.fault_target import workers_in_process

ROOT = Path(__file__).parents[2]
CAUSE = 'ValueError: 3 of 8 <b>& "values"</b> are no numbers'  # what a page must escape
GONE = 'RuntimeError: no neighbour within <1 & "2"'


def shipped() -> dict[str, SweepSpec]:
    """The sweep of each file of sweeps/ that defines one, found by looking."""
    found = {}
    for path in sorted((ROOT / "sweeps").glob("*.py")):
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        defines = any(isinstance(f, ast.Name) and f.id == "SweepSpec" for f in calls)
        module = vars(importlib.import_module(f"sweeps.{path.stem}")) if defines else {}
        specs = [value for value in module.values() if isinstance(value, SweepSpec)]
        found |= {path.stem: specs[0]} if specs else {}
    return found


@dataclass
class Trainer:
    """Stands in for `jobs.run.run_job`: keeps the run folder as the real one does, probes where it is asked to and obeys the judge.

    Of the runs that it begins, from 0 on, those numbered in `failing` fail; the first after them that comes to its end has no k-NN.
    """

    failing: Iterable[int] = ()
    without_value: bool = True
    begun: list[str] = field(default_factory=list)
    blind: str = ""  # the signature of that one

    @staticmethod
    def score(signature: str, metric: str) -> float:
        """From 40 to 80 %, another for each run and metric."""
        return 40 + int(hashlib.sha256(f"{signature} {metric}".encode()).hexdigest()[:8], 16) / 2**32 * 40

    def __call__(
        self,
        job: JobSpec,
        should_stop: Callable[[], bool] = never,
        claim: int = 0,
        judge: Callable[[int, dict[str, float]], str] = no_judge,
    ) -> RunResult | None:
        folder, name, number = RunFolder(job.run_dir), job.run_dir.name, len(self.begun)
        self.begun.append(name)
        folder.prepare(job.train)
        provenance.record(job.run_dir)
        print("training")
        folder.open_metrics(0)
        costs = {
            "seconds": 36.0 + number,
            "device_hours": (36.0 + number) / 3600,
            "images_per_second": 1000.0,
            "parameters": 1000 + number,
        }
        result = RunResult(RunStatus.completed, step=2, claim=claim, data_wait_share=0.01, peak_memory_mb=300.0, **costs)  # type: ignore[arg-type]
        for epoch in range(1, job.train.epochs + 1):
            folder.record("step", epoch, {"epoch": float(epoch), "loss": 1 / epoch, "images_per_second": 1000.0})
            if epoch in job.train.probes.at_epochs and epoch < job.train.epochs:
                values = {key: self.score(name, key) - 1 / epoch for key in ("linear.holdout_top1", "knn.holdout_top1")}
                folder.record("probe", epoch, {"epoch": float(epoch), **values})
                if cause := judge(epoch, values):
                    result.status, result.cause = RunStatus.pruned, cause
                    break
        if number in self.failing:
            print("Traceback <of & to> nothing")
            result.status, result.cause = RunStatus.failed, CAUSE
        if result.status is RunStatus.completed:
            if self.without_value and not self.blind and number > max(self.failing, default=-1):
                self.blind = name
            probes = ["linear"] if name == self.blind else ["linear", "knn"]
            parts = ("holdout_top1", "test_top1", "test_top5", "paper_protocol_top1")
            result.metrics = {f"{p}.{part}": self.score(name, f"{p}.{part}") for p in probes for part in parts}
            result.missing = {"knn": GONE} if name == self.blind else {}
            folder.record("final", job.train.epochs, {"epoch": float(job.train.epochs), **result.metrics})
        folder.close()
        result.probes = folder.probes()
        folder.write_result(result)
        return result


def in_process(monkeypatch: pytest.MonkeyPatch, trainer: Callable[..., RunResult | None] | None) -> None:
    """Workers run in this process, one after the other, with that trainer or the real one; the page is left to the reader's command."""
    known: dict[str, object] = {}

    def load(data: DataConfig) -> object:
        if repr(data) not in known:
            known[repr(data)] = load_splits(data)
        return known[repr(data)]

    workers_in_process(monkeypatch)
    monkeypatch.setattr("cnnjepa.data.datasets.load_splits", load)
    if trainer is not None:
        monkeypatch.setattr(worker, "run_job", trainer)


def run(spec: SweepSpec, *arguments: str) -> tuple[int, str]:
    """Exit status and output of a sweep's command."""
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        status = command.run(spec, ["--cluster", "local", *arguments])
    return status, said.getvalue()


def read(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str]:
    """Exit status and output of `python -m sweeps` with those arguments; an exception is the test's."""
    said = io.StringIO()
    monkeypatch.setattr(sys, "argv", ["sweeps", *arguments])
    with redirect_stdout(said), redirect_stderr(said):
        try:
            status = readers.main()
        except SystemExit as end:
            status = int(end.code or 0)
    return status, said.getvalue()


class Text(HTMLParser):
    """What a page shows in its cells, headings and other elements, and the JSON that its script is given."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.shown: list[str] = []
        self.data = ""
        self.tags: set[str] = set()
        self._within: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in ("meta", "input", "link", "br", "hr"):
            self._within.append("data" if ("id", "data") in attrs else tag)

    def handle_endtag(self, tag: str) -> None:
        if self._within:
            self._within.pop()

    def handle_data(self, data: str) -> None:
        within = self._within[-1] if self._within else ""
        if within == "data":
            self.data += data
        elif within not in ("script", "style") and data.strip():
            self.shown.append(data)
