"""Drill on this machine: run on the stage of stage.py, inject faults into processes and files."""

import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from sweeps.drill import file_faults
from sweeps.drill.observed import NoTargetError, WatchedRun, wait_for

RANKS = 2
_ROOT = Path(__file__).resolve().parent.parent.parent
_START_SECONDS, _END_SECONDS = 300.0, 30.0
_GRACE_SECONDS = 10.0
# Checkpoints and, in time, metrics and log are larger than this. A batch in shared memory, which is
# not on the disk, is smaller.
_FULL_AT_BYTES = 30_000


def _signal(processes: Sequence[psutil.Process], number: int) -> bool:
    """Send a signal to `processes`; return True: the run has to start again."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
    return True


def _is_dead(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _if_there(fault: Callable[[random.Random], bool]) -> Callable[[random.Random], bool]:
    """Wrap `fault`: a process that is gone raises NoTargetError."""

    def inject(draw: random.Random) -> bool:
        try:
            return fault(draw)
        except psutil.NoSuchProcess as error:
            raise NoTargetError(str(error)) from error

    return inject


class RunHere:
    """One run on this machine, from its start to its result."""

    def __init__(self, runs_dir: Path, overrides: Sequence[str]) -> None:
        """Start the stage and a first driver on it."""
        runs_dir.mkdir(parents=True, exist_ok=True)
        self._runs_dir = runs_dir
        line = [sys.executable, "-m", "sweeps.drill.stage", str(runs_dir), str(RANKS), *overrides]
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH", "")]))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": path}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._stage = subprocess.Popen(line, env=environment, cwd=_ROOT, text=True, start_new_session=True, **pipes)  # type: ignore[call-overload]
        self.run = WatchedRun(Path(self._answer()))
        self._container = 0
        self._driver = self._new_driver()
        self.started = time.monotonic()

    def _answer(self) -> str:
        line = self._stage.stdout.readline().strip()
        if not line:
            raise ChildProcessError(f"the stage of the drill ended with status {self._stage.wait()}; see {self._runs_dir}")
        return str(line)

    def _new_driver(self, clock_seconds: float = 0.0, silent: str = "") -> psutil.Process:
        container = f"drill-{self._container}" if self._container else ""
        self._stage.stdin.write(json.dumps({"clock_seconds": clock_seconds, "container": container, "silent": silent}) + "\n")
        self._stage.stdin.flush()
        return psutil.Process(int(self._answer()))

    def keep_alive(self) -> None:
        """Start a driver again if it is gone, as Slurm or a person does."""
        if _is_dead(self._driver):
            self._driver = self._new_driver()

    def close(self) -> None:
        """End all processes of the run."""
        self._stage.stdin.close()
        try:
            self._stage.wait(_END_SECONDS)
        finally:
            self._stage.kill()

    # Targets.

    def _ranks(self) -> list[psutil.Process]:
        """Return the current driver's ranks, in rank order."""
        try:
            found = sorted(self._driver.children(), key=lambda p: p.pid)
        except psutil.NoSuchProcess:
            found = []
        if len(found) != RANKS:
            raise NoTargetError("ranks")
        return found

    def _everything(self) -> list[psutil.Process]:
        return [self._driver, *self._driver.children(recursive=True)]

    def _with_ranks_dead(self, meanwhile: Callable[[Path], None]) -> bool:
        """Kill all ranks and call `meanwhile` with the checkpoints before the driver notices."""
        ranks = self._ranks()
        self._driver.suspend()
        try:
            wait_for("the driver to stop", lambda: self._driver.status() == psutil.STATUS_STOPPED, _END_SECONDS)
            _signal(ranks, signal.SIGKILL)
            wait_for("the ranks to die", lambda: all(map(_is_dead, ranks)), _END_SECONDS)
            meanwhile(self.run.path / "checkpoints")
        finally:
            self._driver.resume()
        return True

    # Faults. Each returns whether the run has to start again.

    def terminate_with_grace(self, draw: random.Random) -> bool:
        """Send SIGTERM; after the grace period send SIGKILL, as in a Slurm preemption."""
        ranks = self._ranks()
        _signal(ranks, signal.SIGTERM)
        _, left = psutil.wait_procs(ranks, timeout=_GRACE_SECONDS)
        _signal([p for p in left if not _is_dead(p)], signal.SIGKILL)
        return True

    def terminate_without_grace(self, draw: random.Random) -> bool:
        """Send SIGTERM and, a moment later, SIGKILL in the middle of the save."""
        ranks = self._ranks()
        _signal(ranks, signal.SIGTERM)
        time.sleep(draw.uniform(0, 0.1))
        return _signal(ranks, signal.SIGKILL)

    def kill_the_driver(self, draw: random.Random) -> bool:
        """Kill the driver. The ranks live, and another driver starts at once."""
        self._ranks()
        self._driver.kill()
        return True

    def kill_everything(self, draw: random.Random) -> bool:
        """Kill the driver, ranks and loader processes, as a power cut of the node does."""
        self._ranks()
        return _signal(self._everything(), signal.SIGKILL)

    def kill_a_loader(self, draw: random.Random) -> bool:
        """Kill a process that loads images."""
        loaders = draw.choice(self._ranks()).children()
        if not loaders:
            raise NoTargetError("loader processes")
        _signal([draw.choice(loaders)], signal.SIGKILL)
        return False

    def show_checkpoint_late(self, draw: random.Random) -> bool:
        """Kill all ranks and hide the newest checkpoint for a while, as NFS may."""
        hidden: list[Path] = []
        self._with_ranks_dead(lambda folder: hidden.append(file_faults.hide_newest(folder, self._runs_dir / "not-yet-seen")))
        time.sleep(draw.uniform(0.2, 2.5))
        file_faults.show_again(hidden[0], self.run.path / "checkpoints")
        return True

    def fill_the_disk(self, draw: random.Random) -> bool:
        """Let the main rank's writes beyond a file size fail for a while, by RLIMIT_FSIZE."""
        rank = self._ranks()[0]
        before = rank.rlimit(resource.RLIMIT_FSIZE)
        rank.rlimit(resource.RLIMIT_FSIZE, (_FULL_AT_BYTES, before[1]))
        try:
            return self._hold_up(draw)
        finally:
            if not _is_dead(rank):
                rank.rlimit(resource.RLIMIT_FSIZE, before)

    def make_read_only(self, draw: random.Random) -> bool:
        """Set the folders' modes to 0555. The stage's processes obey them even as root."""
        self._ranks()
        with file_faults.read_only(self.run.path):
            return self._hold_up(draw)

    def _hold_up(self, draw: random.Random) -> bool:
        """Wait a while; with probability 0.3 ask the run to stop meanwhile. Return if asked."""
        time.sleep(draw.uniform(0.3, 1.0))
        asked = draw.random() < 0.3
        if asked:
            try:
                _signal(self._ranks(), signal.SIGTERM)
            except NoTargetError:
                asked = False
        time.sleep(draw.uniform(0.3, 1.0))
        return asked

    def move_the_clock_back(self, draw: random.Random) -> bool:
        """Kill everything and move the clock back by minutes to hours for what follows.

        Only Python's clock in these processes moves. The times of the claims then lie in the
        future.
        """
        self._ranks()
        _signal(self._everything(), signal.SIGKILL)
        seconds = draw.uniform(60, 36_000)
        file_faults.move_clock_of_files(self.run.path / "claim", seconds)
        self._driver = self._new_driver(-seconds)
        return True

    def suspend_the_owner(self, draw: random.Random) -> bool:
        """Suspend the driver and its ranks, let another driver take over, then wake or kill the first.

        The other driver is in another container, as far as it can see: it knows the first only by
        its heartbeat, which has stopped. What the first still writes must change nothing.
        """
        main, first, attempt = self._ranks()[0], self._driver, self.run.attempt()
        suspended = self._everything()
        _signal(suspended, signal.SIGSTOP)
        self._container += 1
        self._driver = self._new_driver(silent=str(self.run.claim_file(attempt)))
        try:
            wait_for("another owner", lambda: self.run.attempt() > attempt or self.run.ended(), _START_SECONDS)
            time.sleep(draw.uniform(0, 3))  # before it has begun, or during its steps
            if draw.random() < 0.7:
                _signal(suspended, signal.SIGCONT)
                wait_for("the first owner to notice", lambda: self.run.has_let_go(attempt) or _is_dead(main), _START_SECONDS)
        finally:
            # The first driver would start ranks again until the run has ended.
            _signal([first], signal.SIGSTOP)
            _signal([first, *([] if _is_dead(first) else first.children(recursive=True)), *suspended], signal.SIGKILL)
        return True

    @property
    def faults(self) -> dict[str, Callable[[random.Random], bool]]:
        """Return the faults possible here, by name."""
        found: dict[str, Callable[[random.Random], bool]] = {
            "SIGTERM with a grace period": self.terminate_with_grace,
            "SIGTERM without a grace period": self.terminate_without_grace,
            "SIGKILL of a rank": lambda draw: _signal([draw.choice(self._ranks())], signal.SIGKILL),
            "SIGKILL of all ranks": lambda _: _signal(self._ranks(), signal.SIGKILL),
            "SIGKILL of the driver": self.kill_the_driver,
            "SIGKILL of everything": self.kill_everything,
            "SIGKILL of a loader process": self.kill_a_loader,
            "checkpoint truncated": lambda draw: self._with_ranks_dead(lambda folder: file_faults.truncate(folder, draw)),
            "bit of a checkpoint flipped": lambda draw: self._with_ranks_dead(lambda folder: file_faults.flip_a_bit(folder, draw)),
            "checkpoint seen late": self.show_checkpoint_late,
            "disk full for a while": self.fill_the_disk,
            "folder read-only for a while": self.make_read_only,
            "clock moved back": self.move_the_clock_back,
            "suspended owner": self.suspend_the_owner,
        }
        return {name: _if_there(fault) for name, fault in found.items()}

    @property
    def left_out(self) -> dict[str, str]:
        """Return the faults left out here, each with the reason."""
        return {"node loss and requeue by Slurm": "they need a Slurm cluster: --cluster NAME"}
