"""What a worker costs beside its trial, on a real Slurm on this host, and what the watching command takes of processor and memory.

python tests/benchmarks/slots.py [--slots 1000] [--parallel 64] [--json]        trials that compute nothing, see _trivial_rank.py
python tests/benchmarks/slots.py --train --slots 40 --parallel 4 [--json]       one step on one rank: torch's start is part of it

Two cores run all jobs that are active at once, so the seconds are those of a crowded machine; the parts say where they go.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import numpy as np
import psutil
from _report import publish
from PIL import Image
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sweeps.state.folder import Sweep
from sweeps.state.view import View
from tests.support.slurm_cluster import SlurmCluster, free_ports
from tests.support.slurm_files import Options

SCRIPT = Path(__file__).resolve().parent / "_slots_sweep.py"
RANK = Path(__file__).resolve().parent / "_trivial_rank.py"
PROFILE = ["ranks_per_trial=1", "cores_per_trial=1", "gpus_per_trial=0", "memory_gb_per_trial=0.5", "cluster.gres=''"]


def make_images(root: Path) -> None:
    """Two classes of random images, enough for a batch and the splits."""
    for split, count in (("train", 12), ("val", 2)):
        for label in ("a", "b"):
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                pixels = np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / label / f"{i}.png")


class Watched:
    """Processor time and resident memory of the watching command, sampled."""

    def __init__(self, pid: int) -> None:
        self.process = psutil.Process(pid)
        self.megabytes: list[float] = []
        self.first: tuple[float, float] | None = None
        self.last: tuple[float, float] = (0.0, 0.0)

    def sample(self) -> None:
        """Look once; before the command has become the watcher there is nothing to see."""
        try:
            if "sweeps.execution.monitor" not in self.process.cmdline():
                return
            times = self.process.cpu_times()
            self.megabytes.append(self.process.memory_info().rss / 2**20)
        except psutil.Error:
            return
        self.last = time.monotonic(), times.user + times.system
        self.first = self.first or self.last

    @property
    def share_of_a_core(self) -> float:
        """Of the processor, from the first to the last sample."""
        assert self.first is not None
        return (self.last[1] - self.first[1]) / max(self.last[0] - self.first[0], 1e-9)


def job_times(cluster: SlurmCluster) -> dict[str, tuple[float, float]]:
    """Start and end of each array element by the accounting, seconds since 1970."""
    lines = cluster.run("sacct", "-X", "-n", "-P", "-o", "JobID,Start,End", "-S", "now-1days").splitlines()
    found = {}
    for job, start, end in (line.split("|") for line in lines):
        if "T" in start and "T" in end:
            found[job] = datetime.fromisoformat(start).timestamp(), datetime.fromisoformat(end).timestamp()
    return found


def figures_of(sweep_path: Path, jobs: dict[str, tuple[float, float]]) -> dict[str, float]:
    """Where the seconds of a worker go, medians over workers; and whether every trial ran once."""
    view = View(Sweep.load(sweep_path))
    parts: dict[str, list[float]] = {"start_of_job_and_rank": [], "imports_and_claim": [], "trial": [], "end_of_job": [], "slot": []}
    duplicates = 0
    for trial in view.sweep.trials:
        past, result = view.claims(trial), view.result(trial)
        assert result is not None, "every trial has ended"
        duplicates += len(past) != 1
        last = past[-1]
        assert last.slurm is not None
        if last.slurm.job not in jobs:
            continue
        start, end = jobs[last.slurm.job]
        released = (view.sweep.trial_dir(trial) / "claim" / f"{last.attempt:06d}.released").stat().st_mtime
        parts["start_of_job_and_rank"].append(last.owner.started - start)
        parts["imports_and_claim"].append(last.time - last.owner.started)
        parts["trial"].append(released - last.time)
        parts["end_of_job"].append(end - released)
        parts["slot"].append(end - start)
    medians = {f"{name}_s": statistics.median(values) for name, values in parts.items()}
    overhead = [s - t for s, t in zip(parts["slot"], parts["trial"], strict=True)]
    quartiles = statistics.quantiles(overhead, n=4)
    spread = {"overhead_s": statistics.median(overhead), "overhead_q1_s": quartiles[0], "overhead_q3_s": quartiles[2]}
    return {"slots": len(view.sweep.trials), "duplicates": duplicates, **medians, **spread}


def running_now(cluster: SlurmCluster) -> int:
    """Jobs that Slurm calls running; 0 where it is too busy to say."""
    try:
        return cluster.run("squeue", "-h", "-t", "R", "-o", "%i", check=False).count("\n")
    except subprocess.TimeoutExpired:
        return 0


def measure(workers: int, parallel: int, train: bool) -> dict[str, float]:
    """Start a cluster, run the sweep, look at it from outside, stop the cluster."""
    base = Path(tempfile.mkdtemp(prefix="slots-", dir="/tmp"))
    cluster = SlurmCluster(base, Options(port=free_ports(), node_timeout_seconds=300, message_seconds=60))
    try:
        cluster.start()
        make_images(base / "images")
        line = [sys.executable, str(SCRIPT), "--cluster", "test_cluster", "--scale", "smoke", "--runs-dir", str(base / "runs")]
        line += ["--seeds", str(workers), f"max_parallel={parallel}", f"data.root={base / 'images'}", *PROFILE]
        line += [] if train else [f"cluster.python='{sys.executable} {RANK}'"]
        started = time.monotonic()
        with open(base / "watch.log", "w") as log:
            child = subprocess.Popen(line, env=cluster.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
            watched, most = Watched(child.pid), 0
            while child.poll() is None:
                watched.sample()
                most = max(most, running_now(cluster))
                time.sleep(5)
        wall = time.monotonic() - started
        assert child.returncode == 0, (base / "watch.log").read_text()[-2000:]
        time.sleep(3)  # the accounting hears of the last job
        figures = figures_of(base / "runs" / "slots-smoke", job_times(cluster))
        watcher = {"watcher_mb": max(watched.megabytes), "watcher_cpu": watched.share_of_a_core}
        return {**figures, **watcher, "most_at_once": most, "wall_s": wall, "slots_per_minute": 60 * workers / wall}
    finally:
        cluster.stop()
        shutil.rmtree(base, ignore_errors=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exit status 1 where a trial ran twice or the watcher is over its bounds."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", dest="workers", type=int, default=1000)
    parser.add_argument("--parallel", type=int, default=64)
    parser.add_argument("--train", action="store_true", help="trials train a step, and import torch for it")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args(arguments)
    figures = measure(asked.workers, asked.parallel, asked.train)
    table = Table("figure", "value", title="one worker, medians in seconds, and the watching command")
    for name, value in figures.items():
        table.add_row(name, f"{value:.3g}" if value < 100 else f"{value:.0f}")
    publish(asked.json, asked.workers, figures, table, [])
    within = figures["watcher_mb"] < 300 and figures["watcher_cpu"] < 0.05
    return 0 if within and not figures["duplicates"] else 1


if __name__ == "__main__":
    sys.exit(main())
