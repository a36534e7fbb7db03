"""A sweep of short trials under a site's conditions, and what it cost: trials lost, jobs doubled, seconds in which an allocation idled."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sweeps.state import claims
from sweeps.state.submission import Submission
from tests.support import flaky_slurm, forked
from tests.support.site_task import TRAINED
from tests.support.slurm_bench import ROOT, SweepOnSlurm, given
from tests.support.slurm_cluster import SlurmCluster

SCRIPT = ROOT / "tests" / "support" / "site_sweep.py"
ENVIRONMENT = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'support'}"}
ONE_CORE = ["cores_per_trial=1", "gpus_per_trial=1", "gres=gpu:1", "max_parallel=0"]
LIVE = ("PENDING", "RUNNING", "SUSPENDED")


def quick_sweep(cluster: SlurmCluster, runs: Path) -> SweepOnSlurm:
    """A sweep of short trials, one core each."""
    made = SweepOnSlurm(cluster, runs, ranks=1, held=False)
    made.path = runs / "site_sweep-smoke"
    return made


def submit(sweep: SweepOnSlurm, trials: int, *words: str, code: int = 0, alone: bool = False, **environment: str) -> str:
    """Type the sweep's command, and leave its jobs alone; return what it prints. It is a fork, unless it has to be `alone`."""
    whole = {**sweep.cluster.environment, **ENVIRONMENT, **environment}
    profile = [word for word in ONE_CORE if not given(word, words)]
    line = sweep.line("--seeds", str(trials), *profile, *words, "--detach", script=SCRIPT)
    if alone:
        done = subprocess.run(line, cwd=ROOT, env=whole, capture_output=True, text=True, timeout=250, check=False)
    else:
        done = forked.run(line[1:], cwd=ROOT, env=whole, timeout=250)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def check_once(sweep: SweepOnSlurm, trials: int) -> list[list[claims.Claim]]:
    """Every trial completed, and did each epoch once; returns the claims of each."""
    folders = sweep.trial_dirs()
    assert len(folders) == trials
    for folder in folders:
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [r["step"] for r in records if r["kind"] == "step"] == [1, 2, 3, 4]
        assert (folder / "log" / "train.log").read_text().count("begins after epoch") == len(claims.history(folder))
        assert {c.slurm.name for c in claims.history(folder) if c.slurm} <= {s.name for s in Submission.all_of(sweep.sweep)}
        assert json.loads((folder / "result.json").read_text())["status"] == "completed"
    return [claims.history(folder) for folder in folders]


def preempt(cluster: SlurmCluster) -> bool:
    """Submit an urgent job on all nodes, which ends at once; return whether it was accepted: not where too many are queued."""
    words = ["-p", "gpu", f"-N{len(cluster.names)}", "--gres=gpu:4", "-t", "1", "-o", "/dev/null", "--wrap", "true"]
    return bool(cluster.run("sbatch", *words, check=False))


def flaky_path(cluster: SlurmCluster, folder: Path, seed: str) -> str:
    """Return a PATH at whose front are Slurm's clients, of which some calls fail, in jobs too."""
    (folder / "bin").mkdir(parents=True)
    real = Path(shutil.which("sbatch", path=cluster.environment["PATH"]) or "").parent
    values = {"FLAKY_SEED": seed, "FLAKY_LOG": str(folder / "calls"), "FLAKY_REAL": str(real)}
    for name in flaky_slurm.COMMANDS:
        wrapper = folder / "bin" / name
        wrapper.write_text(f"#!{sys.executable} -SE\nimport os\nos.environ |= {values!r}\n{Path(flaky_slurm.__file__).read_text()}")
        wrapper.chmod(0o755)
    return f"{folder / 'bin'}:{cluster.environment['PATH']}"


@dataclass(frozen=True)
class Start:
    """One start of one job: a job that was requeued has several."""

    job: str  # 12_3, or 12
    name: str
    state: str
    begin: float
    end: float


def starts(cluster: SlurmCluster, names: Iterable[str]) -> list[Start]:
    """Return all starts of the jobs of those names, from the accounting, or without one from the controller."""
    known = set(names)
    if "none" in cluster.options.lines.get("AccountingStorageType", ""):
        line = ["squeue", "-r", "-t", "all", "-h", "-O", "JobArrayID:|,Name:|,State:|,StartTime:|,EndTime:|"]
    else:
        line = ["sacct", "-D", "-X", "-n", "-P", "-S", "now-1days", "-o", "JobID,JobName,State,Start,End"]
    environment = {**cluster.environment, "SLURM_TIME_FORMAT": "%s"}
    out = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=60, check=True).stdout
    rows = [[word.strip() for word in row.split("|")] for row in out.splitlines()]
    found = [(row[0], row[1], row[2].split()[0], row[3], row[4]) for row in rows if len(row) >= 5 and row[1] in known]
    return [Start(i, name, state, *(float(t) if t.isdigit() else 0.0 for t in (a, b))) for i, name, state, a, b in found]


@dataclass
class Figures:
    """What one condition did to a sweep."""

    completed: int
    lost: int
    doubled: list[str]
    idle: float  # seconds in which a job held its nodes and no trial trained, over all starts of all jobs, without those of `loading`
    loading: float  # seconds from the start of a job until its first trial begins to train
    starts: int

    def as_row(self, condition: str, happened: str) -> dict[str, Any]:
        return {
            "condition": condition, "happened": happened, "completed": self.completed, "lost": self.lost,
            "doubled": len(self.doubled), "idle": round(self.idle), "loading": round(self.loading), "starts": self.starts,
        }  # fmt: skip


def trained(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """Return the starts of trials (epoch 0) and all epochs ever computed, each with its trial, its job, and from when to when."""
    found = []
    for folder in folders:
        if (path := folder / TRAINED).exists():
            found += [{"trial": folder.name, **json.loads(line)} for line in path.read_text().splitlines()]
    return found


def covered(begin: float, end: float, spans: Iterable[tuple[float, float]]) -> float:
    """Return how many seconds of [begin, end] lie in at least one of the spans."""
    total, last = 0.0, begin
    for a, b in sorted(spans):
        total += max(0.0, min(b, end) - max(a, last))
        last = max(last, b)
    return total


def doubled(all_starts: list[Start], epochs: list[dict[str, Any]]) -> list[str]:
    """Return what was done twice: an epoch that was trained twice, two jobs of one name."""
    counts = Counter((e["trial"], e["epoch"]) for e in epochs if e["epoch"])
    found = [f"{trial} trained epoch {epoch} {n} times" for (trial, epoch), n in counts.items() if n > 1]
    arrays: dict[str, set[str]] = {}
    for start in all_starts:
        arrays.setdefault(start.name, set()).add(start.job.partition("_")[0])
    return found + [f"{name} is the name of jobs {' '.join(sorted(jobs))}" for name, jobs in arrays.items() if len(jobs) > 1]


def figures(sweep: SweepOnSlurm, all_starts: list[Start]) -> Figures:
    """Measure a sweep that has ended."""
    folders = sweep.trial_dirs()
    results = [json.loads((d / "result.json").read_text())["status"] for d in folders if (d / "result.json").exists()]
    epochs = trained(folders)
    idle = loading = 0.0
    for start in all_starts:
        mine = [e for e in epochs if e["job"] == start.job and start.begin - 1 < e["to"] < start.end + 1]
        idle += max(0.0, start.end - start.begin - covered(start.begin, start.end, [(e["from"], e["to"]) for e in mine]))
        loading += max(0.0, min((e["from"] for e in mine), default=start.begin) - start.begin)
    completed = results.count("completed")
    return Figures(completed, len(folders) - completed, doubled(all_starts, epochs), idle - loading, loading, len(all_starts))


@dataclass
class Site:
    """One condition: a cluster that was told to behave so, a shell, and a sweep on it."""

    cluster: SlurmCluster
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    front: list[Path] = field(default_factory=list)  # of PATH
    starts_python: bool = False  # for what Python does at its start; else commands are forks

    def __post_init__(self) -> None:
        self.sweep = quick_sweep(self.cluster, self.folder / "runs")

    @property
    def shell(self) -> dict[str, str]:
        """The variables of the shell in which the sweep's commands are typed."""
        path = ":".join([*map(str, self.front), self.cluster.environment["PATH"]])
        return {**self.cluster.environment, **ENVIRONMENT, "PATH": path, **self.environment}

    def type(self, trials: int, *words: str, code: int = 0) -> str:
        """Type the sweep's command, and leave its jobs alone."""
        return submit(self.sweep, trials, *words, code=code, alone=self.starts_python, **self.shell)

    def ask(self, command: str, *words: str) -> str:
        """Type `python -m sweeps COMMAND` in that shell."""
        line = [sys.executable, "-m", "sweeps", command, str(self.sweep.path), *words]
        done = subprocess.run(line, cwd=ROOT, env=self.shell, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def wrap(self, client: str, *lines: str) -> None:
        """Put a script before one of Slurm's clients, also in jobs; `$real` is the client."""
        folder = self.folder / "bin"
        folder.mkdir(exist_ok=True)
        real = shutil.which(client, path=self.cluster.environment["PATH"])
        (folder / client).write_text("\n".join(["#!/bin/bash", f"real={real}", *lines, 'exec "$real" "$@"', ""]))
        (folder / client).chmod(0o755)
        if folder not in self.front:
            self.front.append(folder)

    def at_start(self, text: str) -> None:
        """Python runs `text` at its start, in jobs too."""
        self.starts_python = True
        folder = self.folder / "python"
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(text)
        self.environment["PYTHONPATH"] = f"{folder}:{ENVIRONMENT['PYTHONPATH']}"

    def results(self) -> int:
        """How many trials have ended."""
        return len(list(self.sweep.path.glob("trials/*/result.json")))

    def epochs(self) -> int:
        """How many epochs were trained so far."""
        return sum(e["epoch"] > 0 for e in trained(self.sweep.path.glob("trials/*")))

    def wait(self, what: str, epochs: int = 0, results: int = 0, seconds: float = 240) -> None:
        """Until so many epochs were trained, and so many trials have ended."""
        self.cluster.wait(what, lambda: self.epochs() >= epochs and self.results() >= results, seconds)

    def nodes_of(self) -> list[str]:
        """The nodes on which trials run, of those claimed last."""
        past = [claims.history(d) for d in self.sweep.trial_dirs()]
        return [p[-1].slurm.node for p in past if p and p[-1].slurm]

    def figures(self, seconds: float = 240) -> Figures:
        """Wait for the end, and measure."""
        self.sweep.wait_for_end(seconds)
        names = {s.name for s in Submission.all_of(self.sweep.sweep)}
        found: list[Start] = []

        def written() -> bool:
            found[:] = starts(self.cluster, names)
            return bool(found) and all(s.end or not s.begin for s in found) and not any(s.state in LIVE for s in found)

        self.cluster.wait("the accounting", written, 60)
        return figures(self.sweep, [s for s in found if s.begin and s.end])
