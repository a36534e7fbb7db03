"""What a decision costs as a search grows to 10,000 trials on 1,000 workers with preemptions, and how long a cold look at it takes.

    python tests/benchmarks/scale.py [--json] [--trials 10000] [--slots 1000] [--preempted 0.1] [--folder DIR] [--sampler random]

The engine is real, and so are the sweep folder and all its files; the clock, the queue and the training are simulated. File operations are
those that Python asks of the system: opens, stats, listings. They are what a shared file system is asked too. Afterwards `status` opens the
folder cold, in a new process. TPE is asked beside it, of as many configurations. Status 1 where a trial ran twice, never, or waited.
"""

import argparse
import builtins
import io
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from _report import publish
from _simulated import Simulation
from rich.table import Table

from sweeps.joint_search import SWEEP
from sweeps.search import sampler
from sweeps.search.sampler import COMPLETE, PRUNED, Outcome
from sweeps.spec.rungs import DEFAULT_ETA, rung_epochs
from sweeps.spec.space import baseline
from sweeps.spec.sweep import FIRST_SEED, SAMPLERS, ScaleName, Search, Trial, build_search
from sweeps.state import claims
from sweeps.state.folder import Sweep

ROOT = Path(__file__).resolve().parents[2]
EPOCHS = 27
operations: Counter[str] = Counter()


def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, counted."""

    def wrapper(*arguments: Any, **more: Any) -> Any:
        operations[name] += 1
        return call(*arguments, **more)

    return wrapper


def count_operations() -> None:
    """From now on; pathlib and the engine look these up again at each call."""
    os.stat = counted("stat", os.stat)
    os.listdir = counted("list", os.listdir)
    os.scandir = counted("list", os.scandir)
    io.open = counted("open", io.open)
    builtins.open = counted("open", builtins.open)


def curve(trial: Trial, epoch: int) -> float:
    """A learning curve that saturates at a height that the configuration has, with a little noise."""
    noise = random.Random(f"{trial.signature} {epoch}")
    lr = float(trial.params["optimizer.lr"])
    height = 70 - 8 * abs(math.log10(lr / 0.004)) - 20 * abs(float(trial.params["method.ema.momentum_start"]) - 0.97)
    return height * (1 - math.exp(-epoch / 6)) + noise.gauss(0, 0.5)


def search_of(trials: int, sampler: str, rungs: list[int]) -> Search:
    """The joint search, over so many configurations."""
    return build_search(SWEEP, SWEEP.smoke, "local", [f"epochs={EPOCHS}"], rungs, sampler=sampler, max_trials=trials, seeds=1)


def tenths(decisions: list[tuple[int, float, int]], trials: int) -> list[dict[str, float]]:
    """Median and 90th percentile of a decision's cost while the n-th tenth of the trials ended."""
    lines = []
    for tenth in range(10):
        mine = [(s, o) for ended, s, o in decisions if ended * 10 // trials == tenth]
        if len(mine) > 1:
            seconds = [s for s, _ in mine]
            lines.append(
                {
                    "ended": tenth * trials // 10,
                    "decisions": len(mine),
                    "median_ms": round(1000 * statistics.median(seconds), 1),
                    "p90_ms": round(1000 * statistics.quantiles(seconds, n=10)[-1], 1),
                    "file_operations": round(statistics.median(o for _, o in mine)),
                }
            )
    return lines


def ask_tpe(sizes: list[int]) -> dict[str, float]:
    """Milliseconds of one choice by TPE, by the number of configurations that it knows of."""
    search, at_random, chance = search_of(1000, "tpe", []), search_of(1000, "random", []), random.Random(0)
    drawn = [sampler.suggest([], at_random, number, 0) for number in range(500)]
    found = {}
    for size in sizes:
        outcomes = [(COMPLETE, [chance.random()], {}) if i % 3 == 0 else (PRUNED, [], {3: chance.random()}) for i in range(size)]
        past = [Outcome(drawn[i % len(drawn)], *outcome) for i, outcome in enumerate(outcomes)]
        times = []
        for number in range(3):
            before = time.perf_counter()
            sampler.suggest(past, search, number, 0)
            times.append(time.perf_counter() - before)
        found[str(size)] = round(1000 * statistics.median(times), 1)
    return found


def cold(path: Path) -> dict[str, float]:
    """Seconds until a new process has shown the status of a finished sweep, and until another has opened it to choose."""
    found = {}
    lines = {
        "status_seconds": [sys.executable, "-m", "sweeps", "status", str(path)],
        "status_json_seconds": [sys.executable, "-m", "sweeps", "status", str(path), "--json"],
        "open_to_choose_seconds": [
            sys.executable,
            "-c",
            "import sys, pathlib; from sweeps.state.folder import Sweep\n"
            "from sweeps.state.view import View; from sweeps.execution.scheduler import next_claim\n"
            "assert next_claim(View(Sweep.load(pathlib.Path(sys.argv[1]))), 'd') is None",
            str(path),
        ],
    }
    for name, line in lines.items():
        before = time.perf_counter()
        subprocess.run(line, cwd=ROOT, stdout=subprocess.DEVNULL, check=True, timeout=600)
        found[name] = round(time.perf_counter() - before, 2)
    return found


def claimed_twice(sweep: Sweep) -> int:
    """Claims beyond the first of each trial."""
    return sum(len(claims.history(sweep.trial_dir(t))) - 1 for t in sweep.trials)


def shown(figures: dict[str, Any]) -> tuple[Table, list[str]]:
    """The figures for a terminal: decisions as a table, the rest as lines."""
    table = Table("trials ended", "decisions", "median ms", "90 % ms", "file operations", title="What a decision costs as the sweep grows")
    for line in figures["decisions"]:
        table.add_row(*(f"{value:,}" for value in line.values()))
    return table, [f"{name}: {value}" for name, value in figures.items() if name != "decisions"]


def main() -> int:
    """Simulate, look, and print."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--slots", dest="workers", type=int, default=1000)
    parser.add_argument("--preempted", type=float, default=0.1, help="probability on each way to a rung")
    parser.add_argument("--sampler", choices=SAMPLERS, default="random", help="what chooses; the model takes far longer than the engine")
    parser.add_argument("--folder", type=Path, help="where the sweep is kept; default: a temporary folder")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as temporary:
        rungs = rung_epochs(EPOCHS, 1, DEFAULT_ETA)
        search = search_of(asked.trials, asked.sampler, rungs)
        first = search.trial(0, 0, baseline(search.space, search.base), FIRST_SEED)
        sweep = Sweep.of(SWEEP, ScaleName.smoke, [first], Path(temporary) / "scale-smoke", search, rungs, DEFAULT_ETA)
        sweep.write()
        simulation = Simulation(
            sweep, curve, asked.workers, random.Random(0), asked.preempted, waits=False, cost=lambda: sum(operations.values())
        )
        count_operations()
        began, ends = time.perf_counter(), Counter[str]()
        for trial, _status in simulation.run():
            ends[trial.signature] += 1
        figures: dict[str, Any] = {
            "trials": len(sweep.trials),
            "slots": asked.workers,
            "preemptions": simulation.preemptions,
            "resumed": simulation.resumed,
            "longest_wait_epochs": simulation.longest_wait,
            "ended_twice": sum(n > 1 for n in ends.values()),
            "never_ended": len(sweep.trials) - len(ends),
            "claimed_twice_without_preemption": claimed_twice(sweep) - simulation.preemptions,
            "simulated_epochs": round(simulation.now, 1),
            "wall_seconds": round(time.perf_counter() - began, 1),
            "decisions": tenths(simulation.decisions, asked.trials),
            "memory_mb": round(psutil.Process().memory_info().rss / 2**20),
            "cold": cold(sweep.path),
            "tpe_ms_by_outcomes": ask_tpe([100, 1000, asked.trials]),
        }
    wrong = ("ended_twice", "never_ended", "claimed_twice_without_preemption")
    faults = [name for name in wrong if figures[name]]
    if len(sweep.trials) != asked.trials or simulation.resumed != simulation.preemptions or simulation.longest_wait > 1:
        faults.append("trials that are missing, or that waited")
    publish(asked.json, len(simulation.decisions), figures, *shown(figures))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
