"""Share what tests on a real Slurm need: a sweep, faults in it, and its comparison with an undisturbed one."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from cnnjepa.run import checkpoint
from cnnjepa.run.files import write_atomic
from cnnjepa.run.folder import TIMING_KEYS
from jobs.slurm.queue import Queue
from sweeps.execution.slurm_array import SlurmEngine
from sweeps.state import claims
from sweeps.state.folder import Sweep
from sweeps.state.submission import Submission
from sweeps.state.view import View
from tests.support import forked
from tests.support.held_rank import HOLD, LET_GO
from tests.support.slurm_cluster import PACKAGES, SlurmCluster, missing_programs
from tests.support.slurm_files import Options

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "support" / "slurm_sweep.py"
HELD_RANK = ROOT / "tests" / "support" / "held_rank.py"
STEPS = 30
# Each fault as a line of the table in docs/how-it-works/fault-injection.md; see tests/faults_table.py.
FAULTS_FILE = "FAULTS_JSON"

needs_slurm = pytest.mark.skipif(bool(missing_programs()), reason=f"Slurm is not installed: apt-get install {PACKAGES}")


@contextmanager
def started_cluster(options: Options) -> Iterator[SlurmCluster]:
    """A cluster in a folder of its own; everything of it is gone afterwards."""
    base = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # pytest's own folders are too long for sockets
    made = SlurmCluster(base, options)
    try:
        made.start()
        yield made
    finally:
        made.stop()
        shutil.rmtree(base, ignore_errors=True)


@contextmanager
def found_by_commands(cluster: SlurmCluster) -> Iterator[None]:
    """Within the block Slurm's commands of this process ask that cluster; tests that follow must not."""
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(cluster.conf)
    try:
        yield
    finally:
        os.environ.pop("SLURM_CONF", None)
        if before is not None:
            os.environ["SLURM_CONF"] = before


@contextmanager
def clean_cluster(cluster: SlurmCluster) -> Iterator[SlurmCluster]:
    """For one test: it begins with the cluster's own options and all nodes up, and leaves no job, and no process of one."""
    cluster.restore()
    try:
        with found_by_commands(cluster):
            yield cluster
    finally:
        cluster.bring_up()
        cluster.wait("an empty queue", lambda: emptied(cluster), 180)
        cluster.wait("the processes of its jobs to end", lambda: not left_behind(cluster), 60)


def emptied(cluster: SlurmCluster) -> bool:
    """Cancel all jobs; whether there was none."""
    if not cluster.run("squeue", "-h").strip():
        return True
    cluster.run("scancel", "--user", str(os.getuid()), "--quiet", check=False)
    return False


def left_behind(cluster: SlurmCluster) -> list[str]:
    """The command lines of all that jobs have left running on the nodes."""
    found = []
    for name in cluster.names:
        for pid in cluster.processes_of_node(name):
            try:
                words = psutil.Process(pid).cmdline()
            except psutil.NoSuchProcess:
                continue
            if words and os.path.basename(words[0]) != "slurmd":
                found.append(" ".join(words))
    return found


class SweepOnSlurm:
    """One sweep folder on the cluster; its arrays have so many ranks a worker, and where `held` stand still when `hold` is called."""

    def __init__(self, cluster: SlurmCluster, runs: Path, ranks: int = 2, steps: int = STEPS, held: bool = True) -> None:
        self.cluster, self.runs, self.steps = cluster, runs, steps
        self.path = runs / "slurm_sweep-smoke"
        self.profile = [f"ranks_per_trial={ranks}", f"cores_per_trial={ranks}"]
        self.profile += [f"cluster.python='{sys.executable} {HELD_RANK}'"] if held else []

    # Commands.

    def line(self, *arguments: str, script: Path = SCRIPT) -> list[str]:
        common = ["--cluster", "test_cluster", "--scale", "smoke", "--runs-dir", str(self.runs), "--name", self.path.name, "--yes"]
        profile = [override for override in self.profile if not given(override, arguments)]
        # Beside the other overrides: argparse wants them in one piece.
        choices = 1 if arguments and not arguments[0].startswith("--") else 0
        first = next((i for i, a in enumerate(arguments) if "=" in a and not a.startswith("--")), choices)
        return [sys.executable, str(script), *arguments[:first], *profile, *arguments[first:], *common]

    def hold(self, step: int) -> None:
        """All runs that come to `step` stand still there, until they are released or asked to stop."""
        self.runs.mkdir(parents=True, exist_ok=True)
        for let_go in self.runs.glob(f"{LET_GO}*"):
            let_go.unlink()
        write_atomic(self.runs / HOLD, str(step))

    def release(self) -> None:
        """They go on."""
        (self.runs / HOLD).unlink(missing_ok=True)

    def start(self, *arguments: str, script: Path = SCRIPT) -> forked.Forked:
        """The command, without the seconds in which it would import torch."""
        words = self.line(*arguments, script=script)[1:]
        return forked.start(words, cwd=ROOT, env=self.cluster.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def start_alone(self, *arguments: str, environment: dict[str, str], script: Path = SCRIPT) -> subprocess.Popen[str]:
        """The command as a process of its own, whose lines can be read while it runs."""
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        whole = {**self.cluster.environment, **environment}
        return subprocess.Popen(self.line(*arguments, script=script), cwd=ROOT, env=whole, text=True, **pipes)

    def run(self, *arguments: str, code: int = 0, seconds: float = 400, environment: dict[str, str] | None = None, **more: Any) -> str:
        """The command to its end; returns what it printed."""
        child = self.start_alone(*arguments, environment=environment, **more) if environment else self.start(*arguments, **more)
        try:
            out, _ = child.communicate(timeout=seconds)
        finally:
            child.kill()
        assert child.returncode == code, out
        return out

    def submit(self, *arguments: str, **more: Any) -> str:
        """Submit, and leave the jobs alone."""
        return self.run(*arguments, "--detach", **more)

    def ask(self, command: str, *arguments: str) -> str:
        words = [*arguments[:1], str(self.path), *arguments[1:]] if command == "status" else [str(self.path), *arguments]
        done = forked.run(["-m", "sweeps", command, *words], cwd=ROOT, env=self.cluster.environment, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.ask("status", "--json"))
        return found

    # What the folder and the queue say.

    @property
    def sweep(self) -> Sweep:
        return Sweep.load(self.path)

    def trial_dirs(self) -> list[Path]:
        return [self.sweep.trial_dir(t) for t in self.sweep.trials]

    def jobs(self) -> list[str]:
        """All elements ever queued for the sweep, that Slurm still knows, as id:state."""
        lines = self.cluster.run("squeue", "-r", "-t", "all", "-h", "-o", "%j %i %T").splitlines()
        names = {s.name for s in Submission.all_of(self.sweep)}
        return [f"{i}:{state}" for name, i, state in (line.split() for line in lines) if name in names]

    def live_jobs(self) -> list[str]:
        return [j.partition(":")[0] for j in self.jobs() if j.endswith((":PENDING", ":RUNNING", ":COMPLETING", ":CONFIGURING"))]

    def step_of(self, trial_dir: Path) -> int:
        """The last step that was recorded."""
        path = trial_dir / "metrics.jsonl"
        steps = re.findall(rb'"step": (\d+)', path.read_bytes()[-2000:]) if path.exists() else []
        return int(steps[-1]) if steps else 0

    def wait(self, what: str, holds: Callable[[], bool], seconds: float = 300) -> None:
        self.cluster.wait(what, holds, seconds)

    def wait_for_step(self, step: int, trial: int = 0) -> Path:
        """Until the trial has recorded `step`."""
        self.wait("sweep.json", (self.path / "sweep.json").exists)
        folder = self.trial_dirs()[trial]
        self.wait(f"step {step}", lambda: self.step_of(folder) >= step)
        return folder

    def wait_for_held(self, step: int) -> Path:
        """Until the first trial stands still at `step`, of which it then holds a checkpoint of training."""
        folder = self.wait_for_step(step)
        self.wait("a checkpoint", lambda: any(c.step > 0 for c in checkpoint.find(folder / "checkpoints")))
        assert self.step_of(folder) == step
        return folder

    def wait_for_end(self, seconds: float = 300) -> None:
        """Until every trial has a result and no job is left."""
        self.wait("results", lambda: all((d / "result.json").exists() for d in self.trial_dirs()), seconds)
        self.wait("jobs to end", lambda: not self.live_jobs(), 60)

    def node_of(self, trial_dir: Path) -> str:
        last = claims.history(trial_dir)[-1].slurm
        assert last is not None
        return last.node

    def job_of(self, trial_dir: Path) -> str:
        last = claims.history(trial_dir)[-1].slurm
        assert last is not None
        return last.job

    def rank_process(self, trial_dir: Path, rank: int) -> psutil.Process:
        for pid in self.cluster.processes_of_node(self.node_of(trial_dir)):
            process = psutil.Process(pid)
            words = process.cmdline()
            is_rank = "sweeps.execution.worker_main" in words and "jobs.slurm.supervisor" not in words and words[0] != "srun"
            if is_rank and process.environ().get("SLURM_PROCID") == str(rank):
                return process
        raise AssertionError(f"no rank {rank} on {self.node_of(trial_dir)}")

    # Proof.

    def lost_steps(self, trial_dir: Path) -> int:
        """Steps that were computed more than once."""
        return len(re.findall(r"^step \d+/", (trial_dir / "log" / "train.log").read_text(), re.M)) - self.steps

    def check_against(self, undisturbed: "SweepOnSlurm") -> None:
        """Every trial ended once, and is bit for bit what it is without the fault."""
        for folder in self.trial_dirs():
            reference = undisturbed.path / "trials" / folder.name
            result, expected = (json.loads((d / "result.json").read_text()) for d in (folder, reference))
            assert result["status"] == "completed", result
            assert {k: v for k, v in result.items() if k not in TIMING_KEYS} == {k: v for k, v in expected.items() if k not in TIMING_KEYS}
            assert result["claim"] == claims.history(folder)[-1].attempt
            assert records(folder) == records(reference)
            assert_same_weights(folder, reference, self.steps)
            log = (folder / "log" / "train.log").read_text()
            assert log.count(f"step {self.steps}/{self.steps} ") == 1
            assert log.count(f"step 1/{self.steps} ") == 1, "it was begun again"
        engine = SlurmEngine.of(self.sweep, Queue(0))
        assert engine is not None
        assert engine.missing(View(self.sweep, queue=engine.queue)) == 0


def given(override: str, arguments: Sequence[str]) -> bool:
    """Whether the arguments set the same key of the profile."""
    key = override.partition("=")[0].removeprefix("cluster.")
    return any(a.partition("=")[0].removeprefix("cluster.") == key for a in arguments)


def records(trial_dir: Path) -> list[dict[str, Any]]:
    lines = (trial_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMING_KEYS} for line in lines]


def tensors(value: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from tensors(inner, f"{path}.{key}")


def assert_same_weights(one: Path, other: Path, steps: int) -> None:
    """The newest checkpoints hold the same step, and the same bits in every tensor: weights, statistics, moments, target."""
    states = []
    for folder in (one, other):
        found = checkpoint.find(folder / "checkpoints")[0]
        assert found.step == steps
        states.append(dict(tensors(checkpoint.read(found, torch.device("cpu")))))
    first, second = states
    assert first.keys() == second.keys()
    assert len(first) > 100
    different = [k for k in first if not torch.equal(first[k], second[k])]
    assert different == []


class Faults:
    """Writes a line of the faults table for each fault that was survived, where asked to."""

    @contextmanager
    def line(self, name: str, sweep: SweepOnSlurm) -> Iterator[dict[str, str]]:
        """`happened` is what the caller puts into the yielded dict; the rest is read off the run folders."""
        said: dict[str, str] = {}
        started = time.monotonic()
        yield said
        folders = sweep.trial_dirs()
        lost = sum(sweep.lost_steps(d) for d in folders)
        seconds = [json.loads((d / "result.json").read_text())["seconds"] / sweep.steps for d in folders]
        starts = sum(len(claims.history(d)) for d in folders)
        entry = {
            "fault": name,
            "happened": said["happened"],
            "trials": len(folders),
            "starts": starts,
            "steps_lost": lost,
            "seconds_lost": round(lost * sum(seconds) / len(seconds), 1),
            "test_seconds": round(time.monotonic() - started, 1),
        }
        print(json.dumps(entry))
        if os.environ.get(FAULTS_FILE):
            with open(os.environ[FAULTS_FILE], "a") as file:
                file.write(json.dumps(entry) + "\n")
