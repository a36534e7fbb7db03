"""Take one trial over from owners that are suspended at random moments, woken up or killed; count what that costs.

Each owner is a process of its own, in what claims take for a PID namespace of its own, as on another host.
"""

import json
import os
import random
import re
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from cnnjepa.run import checkpoint
from cnnjepa.run.folder import TIMING_KEYS, RunFolder, RunStatus
from jobs.config import compose_job
from sweeps.drill.compare import Proof, compare_records, compare_states
from sweeps.execution.worker import run_worker
from sweeps.spec.sweep import Configuration, ScaleName, SweepSpec, build_trials
from sweeps.state import claims
from sweeps.state.folder import Sweep
from tests.support import forked
from tests.support.held import wait_until
from tests.support.runs import final_state
from tests.support.tiny_sweep import sweep as tiny_sweep

_OF_AN_ATTEMPT = re.compile(r"step-\d{9}-(\d{6})-[0-9a-f]{16}\.pt|(?:metrics|train)\.(\d+)\.(?:jsonl|log)")
_END_SECONDS = 600.0  # on a crowded machine
WAYS = ("woken up", "woken up when the next owner is dead", "killed", "woken up with the next owner, which was suspended too")


@dataclass
class Found:
    """What a takeover came to."""

    way: str
    suspended_at: int  # step of the first owner
    attempts: int = 0
    records_lost: int = 0
    others_deleted: list[str] = field(default_factory=list)
    proof: Proof = field(default_factory=Proof)

    @property
    def holds(self) -> bool:
        """Return whether the run equals the undisturbed one, and no owner deleted another one's files."""
        return self.proof.holds and not self.records_lost and not self.others_deleted


def new_sweep(runs: Path, every_minutes: float) -> Sweep:
    """A sweep with one trial of 30 steps, probed on the way."""
    spec = tiny_sweep()
    one = SweepSpec(
        spec.name, spec.question, configurations=[Configuration({"method.predictor.depth": 1})], smoke=spec.smoke, paper=spec.paper
    )
    overrides = ["epochs=6", "probes.every_epochs=2", f"checkpoint.every_minutes={every_minutes}"]
    made = Sweep.of(one, ScaleName.smoke, build_trials(one, one.smoke, 1, "local", overrides), runs / "takeovers-smoke")
    made.write()
    return made


def own(folder: Path, container: str, silent: list[Path], removals: Path) -> None:
    """Be an owner: run the trial, and note what this process removes or renames."""
    claims._namespace = lambda: container
    noted = os.open(removals, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def audit(event: str, arguments: tuple[object, ...]) -> None:
        if event in ("os.remove", "os.rename"):
            os.write(noted, f"{time.time()} {Path(str(arguments[0])).name}\n".encode())

    sys.addaudithook(audit)
    run_worker(Sweep.load(folder), compose_job(["cluster=local"]).cluster, claims.Process.me().driver, lambda: False, frozenset(silent))


class Takeover:
    """One trial and its owners, by number."""

    def __init__(self, runs: Path, draw: random.Random, span_seconds: float) -> None:
        self.sweep = new_sweep(runs, draw.choice((0.0, 0.002, 0.004)))
        self.trial = self.sweep.trial_dir(self.sweep.trials[0])
        self.runs, self.draw, self.span = runs, draw, span_seconds
        self.owners: list[forked.Forked] = []

    def claim(self, attempt: int) -> Path:
        """Return the file of a claim."""
        return self.trial / "claim" / f"{attempt:06d}.json"

    def removals(self, number: int) -> Path:
        """Return the file of what an owner has removed."""
        return self.runs / f"removals-{number}"

    def start(self) -> forked.Forked:
        """Start the next owner, who believes that all before are dead."""
        number = len(self.owners) + 1
        silent = [str(path) for path in sorted((self.trial / "claim").glob("*.json"))]
        words = ["-m", "tests.support.takeovers", str(self.sweep.path), f"container {number}", str(self.removals(number)), *silent]
        with open(self.runs / f"owner-{number}.txt", "wb") as output:
            self.owners.append(forked.start(words, stdout=output, stderr=output))
        return self.owners[-1]

    def started(self) -> forked.Forked:
        """Start the next owner, and wait until it has claimed the trial, or found it ended."""
        owner, attempt = self.start(), len(self.owners)
        wait_until("claim", lambda: self.claim(attempt).exists() or owner.poll() is not None, seconds=_END_SECONDS)
        return owner

    def wait_a_while(self) -> None:
        """Wait for anything from no time to that of most of the run."""
        time.sleep(self.draw.uniform(0, 0.8 * self.span))

    def step(self) -> int:
        """Return the last step on record."""
        return max((r["step"] for r in RunFolder(self.trial).metrics()), default=0)


def wake_up(owner: forked.Forked) -> None:
    """Let an owner go on, until it ends by itself."""
    owner.send_signal(signal.SIGCONT)
    owner.wait(_END_SECONDS)


def take_over(runs: Path, seed: str, way: str, undisturbed: Path, span_seconds: float) -> Found:
    """Do one takeover, and compare the run with an undisturbed one."""
    draw = random.Random(seed)
    it = Takeover(runs, draw, span_seconds)
    try:
        first = it.started()
        it.wait_a_while()
        first.send_signal(signal.SIGSTOP)
        found = Found(way, it.step())
        second = it.started()
        it.wait_a_while()
        if way == WAYS[0]:
            wake_up(first)
        elif way == WAYS[1]:
            second.kill()
            second.wait(_END_SECONDS)
            there = {p.name for p in (it.trial / "checkpoints").glob("*.pt") if attempt_of(p.name) not in (None, 1)}
            wake_up(first)
            found.others_deleted += sorted(there - {p.name for p in (it.trial / "checkpoints").iterdir()})
        elif way == WAYS[2]:
            first.kill()
        else:
            second.send_signal(signal.SIGSTOP)
            it.started()
            it.wait_a_while()
            wake_up(first)
            wake_up(second)
        it.wait_a_while()
        if draw.random() < 0.7:
            it.owners[-1].kill()
        it.owners[-1].wait(_END_SECONDS)
        it.start().wait(_END_SECONDS)
    finally:
        for owner in it.owners:
            owner.kill()
    judge(found, it, undisturbed)
    return found


def attempt_of(name: str) -> int | None:
    """Return the attempt whose file this is by its name, None if it is nobody's."""
    match = _OF_AN_ATTEMPT.fullmatch(name)
    return int(match[1] or match[2]) if match else None


def judge(found: Found, it: Takeover, undisturbed: Path) -> None:
    """Compare the run with the undisturbed one, and look for what owners removed after their time."""
    found.attempts = len(list((it.trial / "claim").glob("*.json")))
    for number in range(1, len(it.owners) + 1):
        after, path = it.claim(number + 1), it.removals(number)
        if after.exists() and path.exists():
            lost = json.loads(after.read_text())["time"]
            gone = [line.split(" ", 1) for line in path.read_text().splitlines()]
            found.others_deleted += [name for at, name in gone if float(at) > lost and attempt_of(name) not in (None, number)]
    run, reference = RunFolder(it.trial), RunFolder(undisturbed)
    result, expected = run.result(), reference.result()
    assert expected is not None
    if result is None or result.status is not RunStatus.completed:
        found.proof.lost = "it has no result" if result is None else f"{result.status.name}: {result.cause}"
        return
    found.records_lost = max(0, len(reference.metrics()) - len(run.metrics()))
    compare_records(found.proof, run.metrics(), reference.metrics())
    compare_states(found.proof, final_state(it.trial), final_state(undisturbed))
    ours, theirs = ({k: v for k, v in r.to_dict().items() if k not in TIMING_KEYS} for r in (result, expected))
    found.proof.compare_values("probe results", "result", ours, theirs)
    newest = checkpoint.find(it.trial / "checkpoints")[0]
    if newest.step != result.step or newest.attempt != found.attempts:
        found.proof.differs("weights", f"the checkpoint that is read is {newest.path.name}, of {found.attempts} attempts")


def run_undisturbed(runs: Path) -> tuple[Path, float]:
    """Run the trial without a fault; return its folder, and the seconds from its claim to its end."""
    it = Takeover(runs, random.Random(0), 0.0)
    it.started()
    began = time.monotonic()
    assert it.owners[0].wait(_END_SECONDS) == 0, (runs / "owner-1.txt").read_text()
    return it.trial, time.monotonic() - began


def campaign(folder: Path, count: int, seed: str) -> list[Found]:
    """Do `count` takeovers, each way in turn."""
    undisturbed, seconds = run_undisturbed(folder / "undisturbed")
    draw, found = random.Random(seed), []
    for number in range(count):
        way = WAYS[(number + draw.randrange(len(WAYS)) * (count < len(WAYS))) % len(WAYS)]
        found.append(take_over(folder / str(number), f"{seed} {number}", way, undisturbed, seconds))
    return found


if __name__ == "__main__":
    own(Path(sys.argv[1]), sys.argv[2], [Path(path) for path in sys.argv[4:]], Path(sys.argv[3]))
