"""Run a drill: one reference run, then equal runs with faults injected at random steps."""

import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from jobs.slurm.queue import SlurmError
from sweeps.drill.compare import Proof, prove
from sweeps.drill.observed import NoTargetError, WatchedRun, wait_for

_STEPS_BETWEEN = (1, 7)  # bounds of the steps from one fault to the next
_STEPS_TO_FEEL = 3  # images for as many steps are loaded ahead
_TRIES = 20  # attempts at one fault that finds no target, before the next fault takes its place
_RUN_SECONDS = 3600.0  # a run that has not ended by then counts as lost

Fault = Callable[[random.Random], bool]  # return whether the run has to start again
Say = Callable[[str], None]


class Scene(Protocol):
    """A run that takes faults, on this machine or on a cluster."""

    run: WatchedRun
    started: float  # time.monotonic() at the start

    @property
    def faults(self) -> dict[str, Fault]:
        """Return name -> fault. A fault raises NoTargetError if it finds no target."""

    @property
    def left_out(self) -> dict[str, str]:
        """Return the faults that cannot be injected here, each with the reason."""

    def keep_alive(self) -> None:
        """Run the command again if it is gone, as a person would."""

    def close(self) -> None:
        """End all processes."""


@dataclass(frozen=True)
class Injected:
    """One injected fault and its cost."""

    fault: str
    step: int  # reached by the run at the fault
    steps_repeated: int
    # Time until that step was passed again, less an undisturbed run's time for the steps gained.
    seconds_lost: float


@dataclass
class Drill:
    """Findings of a drill."""

    step_seconds: float  # median of the reference run
    injected: list[Injected] = field(default_factory=list)
    proofs: list[Proof] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def lost(self) -> int:
        """Return the number of runs that did not complete."""
        return sum(bool(p.lost) for p in self.proofs)

    @property
    def duplicated(self) -> int:
        """Return the number of duplicated records and rows."""
        return sum(len(p.duplicated) for p in self.proofs)

    @property
    def different_bits(self) -> int:
        """Return the number of differing bits in tensors, plus one per difference of any kind."""
        values = sum(len(w) for p in self.proofs for aspect, w in p.different.items())
        return sum(p.different_bits for p in self.proofs) + values

    @property
    def holds(self) -> bool:
        """Return whether nothing was lost, duplicated or changed."""
        return bool(self.proofs) and all(p.holds for p in self.proofs)


def order(kinds: Sequence[str], seed: int) -> Iterator[str]:
    """Yield the kinds forever, in rounds. Each round has every kind once, in a random order."""
    draw = random.Random(seed)
    while True:
        yield from draw.sample(kinds, len(kinds))


def write_table(run: WatchedRun) -> None:
    """Write results.csv with the sweep's own command; raise RuntimeError if it fails."""
    line = [sys.executable, "-m", "sweeps", "results", str(run.path.parent.parent), "--format", "csv"]
    done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=Path(__file__).resolve().parent.parent.parent)
    if done.returncode:
        raise RuntimeError(f"python -m sweeps results: {done.stderr.strip()}")


def run_undisturbed(scene: Scene) -> None:
    """Let a run finish undisturbed, and write its table."""
    try:
        wait_for("the undisturbed run", scene.run.ended, _RUN_SECONDS)
    finally:
        scene.close()
    write_table(scene.run)


def inject(scene: Scene, name: str, draw: random.Random, step_seconds: float) -> Injected:
    """Inject one fault and wait until the run has passed every step it had reached."""
    run = scene.run
    first, log_start, began = run.step(), run.log_size(), time.monotonic()
    attempt, reached = run.attempt(), first
    starts_again = scene.faults[name](draw)

    def passed() -> bool:
        nonlocal reached
        scene.keep_alive()
        if run.ended():
            return True
        if starts_again and run.attempt() == attempt:  # the run goes on until it notices the fault
            reached = max(reached, run.step())
            return False
        return run.step() > reached + (0 if starts_again else _STEPS_TO_FEEL)

    wait_for(f"the run to continue after {name} at step {first}", passed, _RUN_SECONDS)
    seconds = time.monotonic() - began
    resumed = run.resumed_at(log_start)
    repeated = 0 if resumed is None else max(reached - resumed, 0)
    return Injected(name, first, repeated, max(seconds - (run.step() - first) * step_seconds, 0.0))


def disturb(scene: Scene, found: Drill, faults: int, names: Iterator[str], draw: random.Random, say: Say) -> None:
    """Inject faults into one run until it ends or the drill has `faults` in all."""
    name, tries, next_step = next(names), 0, draw.randint(*_STEPS_BETWEEN)
    deadline = time.monotonic() + _RUN_SECONDS
    while not scene.run.ended() and time.monotonic() < deadline:
        scene.keep_alive()
        if len(found.injected) == faults or scene.run.step() < next_step or not scene.run.gained():
            time.sleep(0.03)
            continue
        time.sleep(draw.uniform(0, 3 * found.step_seconds))  # anywhere in a step or a save
        try:
            done = inject(scene, name, draw, found.step_seconds)
        except (NoTargetError, SlurmError, IndexError) as error:
            # The run is about to end or start, or the fault is impossible here.
            tries += 1
            time.sleep(0.05)
            if tries == _TRIES:
                found.left_out.setdefault(name, f"it found no target: {error}")
                name, tries = next(names), 0
            continue
        found.injected.append(done)
        found.left_out.pop(name, None)
        tries = 0
        line = f"{len(found.injected)}/{faults} run {len(found.proofs) + 1}: {name} at step {done.step}"
        say(f"{line}: {done.steps_repeated} steps repeated, {done.seconds_lost:.1f} s lost")
        name, next_step = next(names), scene.run.step() + draw.randint(*_STEPS_BETWEEN)


def drill(make: Callable[[str], Scene], faults: int, seed: int, say: Say) -> Drill:
    """Run the reference, then run after run under faults, and compare each with the reference.

    `make` starts a run by its name. Stop after `faults` faults, or a run that is lost or had none.
    """
    say("reference run without faults")
    scene = make("undisturbed")
    reference = scene.run
    run_undisturbed(scene)
    seconds = time.monotonic() - scene.started
    step_seconds = reference.seconds_a_step()
    result = Drill(step_seconds, left_out=dict(scene.left_out))
    say(f"it took {seconds:.1f} s, {1000 * step_seconds:.0f} ms per step")
    draw, names = random.Random(seed), order(sorted(scene.faults), seed)
    while len(result.injected) < faults:
        number, before = len(result.proofs) + 1, len(result.injected)
        scene = make(f"struck-{number}")  # the folder's name since 0.1
        try:
            disturb(scene, result, faults, names, draw, say)
        finally:
            scene.close()
        write_table(scene.run)
        result.proofs.append(prove(scene.run.path, reference.path))
        say(f"run {number}: {verdict(result.proofs[-1])}")
        if result.proofs[-1].lost or len(result.injected) == before:
            break
    return result


def verdict(proof: Proof) -> str:
    """Return the result of a comparison in one line."""
    if proof.holds:
        return "equals the undisturbed run bit for bit"
    if proof.lost:
        return f"LOST: {proof.lost}"
    found = [f"{aspect}: {what[0]}" + (f" and {len(what) - 1} more" if len(what) > 1 else "") for aspect, what in proof.different.items()]
    return "DIFFERS: " + "; ".join([*found, *(f"{d} is duplicated" for d in proof.duplicated)])
