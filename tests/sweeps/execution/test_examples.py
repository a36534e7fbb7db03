"""The programs of docs/examples, swept as they stand: killed -9, preempted and requeued, none is lost, and nothing is done twice."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from cnnjepa.run.attempts import numbered
from cnnjepa.run.files import write_atomic
from cnnjepa.run.folder import RunStatus
from sweeps.state import claims
from sweeps.state.folder import Sweep
from sweeps.state.submission import Submission
from tests.support.held import wait_until
from tests.support.killed_run import EXAMPLES, attempt, configured, loaded, scores
from tests.support.sample import seeded
from tests.support.scored import result_of
from tests.support.site_bench import ONE_CORE, doubled, preempt, starts
from tests.support.slurm_bench import ROOT, SweepOnSlurm, needs_slurm
from tests.support.slurm_cluster import SlurmCluster

pytestmark = pytest.mark.slow
SEEDS, TRIALS, KILLS = 2, 4, 3
# Of the programs that are not held so many that an attempt takes seconds.
EPOCHS = {"shell_walk": 12, "sklearn_digits": 150, "pytorch_digits": 100, "hydra_sweep": 1000, "lightning_digits": 40}
GAIN = 3  # epochs that an attempt has recorded when it is disturbed

_SAMPLED = [name if name == "shell_walk" else pytest.param(name, marks=pytest.mark.nightly) for name in EPOCHS]


class Hold:
    """Where the script in bash stands still, after it has reported an epoch and before it has saved it."""

    def __init__(self, folder: Path) -> None:
        self._at, self.bash_env = folder / "hold", folder / "hold.sh"
        held = f'[ -e {self._at} ] && [ "$epoch" -ge "$(<{self._at})" ]'
        self.bash_env.write_text(f'mv() {{ while {held}; do sleep 0.05; done; command mv "$@"; }}\n')

    def at(self, epoch: int) -> None:
        """Let it stand still at that epoch, and not before."""
        write_atomic(self._at, str(epoch))

    def release(self) -> None:
        """Let it run to its end."""
        self._at.unlink()


def process_of(claim: claims.Claim) -> psutil.Process | None:
    """The process that owns a trial, on this machine or on a node of the test's Slurm, whose processes are this machine's too."""
    with contextlib.suppress(psutil.NoSuchProcess):
        found = psutil.Process(claim.owner.pid)
        if abs(found.create_time() - claim.owner.started) < 1 and found.status() != psutil.STATUS_ZOMBIE:
            return found
    return None


@dataclass
class Disturbed:
    """A sweep of an example that is disturbed, and what was done to it."""

    path: Path
    epochs: int
    killed: list[tuple[Path, claims.Claim]]  # attempts, each with its run folder

    @cached_property
    def folders(self) -> list[Path]:
        """The run folders, once the sweep has some."""
        sweep = Sweep.load(self.path)
        return [sweep.trial_dir(trial) for trial in sweep.trials]

    def owner(self, folder: Path) -> claims.Claim | None:
        """The attempt that has gained some epochs by itself, and whose process lives; None where there is none."""
        past = claims.history(folder)
        if not past or process_of(past[-1]) is None or (folder / "result.json").exists():
            return None
        records = numbered(folder / "metrics.jsonl", past[-1].attempt)
        steps = [json.loads(line)["step"] for line in records.read_bytes().split(b"\n")[:-1]] if records.exists() else []
        return past[-1] if steps and past[-1].step + GAIN <= steps[-1] < self.epochs else None

    def gaining(self, folder: Path, after: int = 0) -> claims.Claim | None:
        """The owner, where its attempt is later than `after`."""
        return found if (found := self.owner(folder)) and found.attempt > after else None

    def kill(self, folder: Path, after: int = 0) -> None:
        """Kill -9 the process that owns the trial, once an attempt later than `after` gains."""
        owners: list[claims.Claim] = []
        wait_until(f"attempt {after + 1} of {folder.name}", lambda: owners.extend(filter(None, [self.gaining(folder, after)])) or owners)
        process = process_of(owners[0])
        assert process is not None
        process.kill()
        self.killed.append((folder, owners[0]))

    def check(self, name: str, whole: Path) -> dict[str, int]:
        """Check that each trial completed, as an undisturbed one does, and that no two attempts overlap; return figures."""
        configured(loaded(EXAMPLES / f"{name}.py").SWEEP)
        sweep = Sweep.load(self.path)
        assert len(sweep.trials) == TRIALS
        attempts = 0
        for trial in sweep.trials:
            folder = sweep.trial_dir(trial)
            undisturbed = attempt(trial.config, whole / folder.name, 1)
            assert undisturbed is not None
            result, past = result_of(folder), claims.history(folder)
            assert (result.status, result.metrics) == (RunStatus.completed, undisturbed.metrics)
            assert result.claim == past[-1].attempt
            for kind in ("step", "probe"):
                assert [r["step"] for r in scores(folder) if r["kind"] == kind] == list(range(1, self.epochs + 1))
            assert scores(folder) == scores(whole / folder.name)
            assert overlapping(folder, past) == []
            attempts += len(past)
        for folder, claim in self.killed:
            assert not (folder / "claim" / f"{claim.attempt:06d}.released").exists()
            assert claims.history(folder)[-1].attempt > claim.attempt
        return {"completed": len(sweep.trials), "attempts": attempts, "kills": len(self.killed)}


def overlapping(folder: Path, past: Iterable[claims.Claim]) -> list[str]:
    """The files that an attempt has written after the next one had begun."""
    return [
        str(file)
        for before, after in pairwise(past)
        for file in folder.rglob(f"*.{before.attempt}.*")
        if "checkpoints" not in file.parts and file.stat().st_mtime > after.time
    ]


@needs_slurm
@pytest.mark.xdist_group("slurm-3")
@seeded
@pytest.mark.parametrize("name", _SAMPLED)
def test_an_example_survives_what_slurm_and_kills_do_to_it(name: str, seed: str, cluster: SlurmCluster, tmp_path: Path) -> None:
    began, epochs, draw = time.monotonic(), EPOCHS[name], random.Random(f"{seed} {name}")
    on_slurm = SweepOnSlurm(cluster, tmp_path / "runs", ranks=1, held=False)
    on_slurm.path = tmp_path / "runs" / f"{name}-smoke"
    hold = Hold(tmp_path)
    hold.at(GAIN)
    words = [*ONE_CORE, "partition=gpu-preempt", f"epochs={epochs}", f"setup=['export BASH_ENV={hold.bash_env}']"]
    on_slurm.submit("--seeds", str(SEEDS), *words, script=EXAMPLES / f"{name}.py")
    sweep = Disturbed(on_slurm.path, epochs, [])
    on_slurm.wait("all trials", lambda: all(sweep.owner(folder) for folder in sweep.folders))
    first = {folder: claims.history(folder)[-1] for folder in sweep.folders}
    assert preempt(cluster)
    on_slurm.wait("the preemption", lambda: not any(map(process_of, first.values())))
    hold.at(2 * GAIN)
    requeued, *others = draw.sample(sweep.folders, TRIALS)
    for folder in others:
        sweep.kill(folder, first[folder].attempt)
    on_slurm.wait("the next attempt", lambda: bool(sweep.gaining(requeued, first[requeued].attempt)))
    second = claims.history(requeued)[-1]
    cluster.run("scontrol", "requeue", on_slurm.job_of(requeued))
    on_slurm.wait("the requeue", lambda: process_of(second) is None)
    hold.release()
    on_slurm.wait_for_end()
    figures = sweep.check(name, tmp_path / "whole")
    assert (figures["kills"], figures["attempts"]) == (KILLS, 2 * TRIALS + KILLS + 1)
    for folder in sweep.folders:
        restarts = {c.slurm.restart for c in claims.history(folder) if c.slurm}
        assert max(restarts) >= (2 if folder == requeued else 1)
    jobs = {s.name for s in Submission.all_of(on_slurm.sweep)}
    twice = doubled(starts(cluster, jobs), [])
    assert twice == []
    print(json.dumps({"example": name, "seconds": round(time.monotonic() - began), **figures, "doubled": len(twice)}))


def kill_all(command: subprocess.Popen[bytes]) -> None:
    """Kill -9 its process group, and what Ray has started in groups of its own."""
    below = psutil.Process(command.pid).children(recursive=True)
    os.killpg(command.pid, signal.SIGKILL)
    for process in below:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    command.wait()


@pytest.mark.nightly
@pytest.mark.parametrize("name", EPOCHS)
def test_an_example_survives_three_kills_of_its_command(name: str, tmp_path: Path) -> None:
    began, epochs = time.monotonic(), EPOCHS[name]
    line = [sys.executable, f"docs/examples/{name}.py", "--cluster", "local", "--seeds", str(SEEDS)]
    line += ["--runs-dir", str(tmp_path / "runs"), "--name", f"{name}-smoke", "max_parallel=2", f"epochs={epochs}"]
    hold = Hold(tmp_path)
    environment = {**os.environ, "BASH_ENV": str(hold.bash_env), "PYTHONPATH": str(ROOT)}
    sweep = Disturbed(tmp_path / "runs" / f"{name}-smoke", epochs, [])
    dead: list[tuple[Path, claims.Claim]] = sweep.killed

    def alive() -> list[tuple[Path, claims.Claim]]:
        if not (sweep.path / "sweep.json").exists():
            return []
        found = [(folder, owner) for folder in sweep.folders if (owner := sweep.owner(folder))]
        return [one for one in found if one not in dead]

    for kill in range(1, KILLS + 1):
        hold.at(kill * GAIN)
        with (tmp_path / "said").open("w") as output:
            child = subprocess.Popen(line, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True)
        try:
            wait_until("a trial that gains", alive, lambda c=child: c.poll() is None)  # type: ignore[misc]
            running = alive()
        finally:
            kill_all(child)
        dead += running
        wait_until("their end", lambda r=running: not any(process_of(claim) for _, claim in r))  # type: ignore[misc]
    hold.release()
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = sweep.check(name, tmp_path / "whole")
    assert figures["kills"] >= KILLS
    print(json.dumps({"example": name, "seconds": round(time.monotonic() - began), **figures, "doubled": 0}))
