"""Drill on a Slurm cluster, from a login node, with the rights of its user."""

import getpass
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

from jobs.cluster import ClusterProfile
from jobs.slurm import queue as slurm
from jobs.slurm.queue import SlurmError
from sweeps.drill import file_faults
from sweeps.drill.observed import NoTargetError, WatchedRun, wait_for

_ROOT = Path(__file__).resolve().parent.parent.parent
_SUBMIT_SECONDS, _ASK_SECONDS, _LEAVE_SECONDS = 600.0, 30.0, 120.0
_PAUSE_SECONDS = 1.0
_LIMIT_MINUTES = 60
_FULL_AT_BYTES = 30_000


def command(profile: str, cluster: ClusterProfile, runs_dir: Path, overrides: Sequence[str]) -> list[str]:
    """Return the command that submits the drilled run, for an hour at most, and watches it.

    `profile` is the name of `cluster`, or the absolute path of its file.
    """
    line = [sys.executable, "-m", "sweeps.drill.sweep", "--cluster", profile, "--scale", "smoke"]
    return [*line, "--runs-dir", str(runs_dir), f"time_limit_minutes={min(cluster.time_limit_minutes, _LIMIT_MINUTES)}", *overrides]


class RunOnSlurm:
    """One run as a Slurm job, from its submission to its result."""

    def __init__(self, profile: str, cluster: ClusterProfile, runs_dir: Path, overrides: Sequence[str]) -> None:
        """Submit the run and wait until it is claimed: a pending job is no target."""
        runs_dir.mkdir(parents=True, exist_ok=True)
        self._profile, self._cluster, self._runs_dir, self._overrides = profile, cluster, runs_dir, overrides
        self._log = open(runs_dir / "command.log", "a")  # noqa: SIM115, closed by close()
        self._command = self._run_command()
        wait_for("the submission", lambda: self._trial() is not None or self._command.poll() is not None, _SUBMIT_SECONDS)
        trial = self._trial()
        if trial is None:
            raise ChildProcessError(self._last_word())
        self.run = WatchedRun(trial)
        wait_for("the job to start", lambda: self.run.attempt() > 0 or self._command.poll() is not None, float("inf"), _PAUSE_SECONDS)
        if not self.run.attempt():
            raise ChildProcessError(self._last_word())
        self.started = time.monotonic()

    def _run_command(self) -> subprocess.Popen[bytes]:
        line = command(self._profile, self._cluster, self._runs_dir, self._overrides)
        return subprocess.Popen(line, cwd=_ROOT, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, start_new_session=True)

    def _last_word(self) -> str:
        """Return the last line that the command printed."""
        return next(iter((self._runs_dir / "command.log").read_text().strip().splitlines()[::-1]), "the command printed nothing")

    def _trial(self) -> Path | None:
        return next(self._runs_dir.glob("*/trials/*"), None)

    def keep_alive(self) -> None:
        """Run the command again if it was killed. The job does not depend on it."""
        if self._command.poll() is not None and not self.run.ended():
            self._command = self._run_command()

    def close(self) -> None:
        """Wait until the job has left its node. Cancel a run that has not ended."""
        try:
            if not self.run.ended():
                self._command.kill()
                slurm.cancel([self._job()])
            self._command.wait(_LEAVE_SECONDS)
        except (subprocess.TimeoutExpired, SlurmError, KeyError):
            self._command.kill()
        finally:
            self._log.close()

    # Targets.

    def _job(self) -> str:
        return str(self.run.claim()["slurm"]["job"])

    def _ranks(self) -> str:
        """Return the ID of the Slurm step that runs the ranks."""
        shown = slurm.ask(["squeue", "-h", "-s", "-j", self._job(), "-o", "step=%i"], _ASK_SECONDS)
        numbered: list[str] = re.findall(r"step=(\S+\.\d+)\s", shown)
        if not numbered:
            raise NoTargetError("a step of ranks")
        return max(numbered, key=lambda s: int(s.rpartition(".")[2]))

    def _signal_ranks(self, name: str) -> bool:
        """Send a signal to all ranks; return True: they have to start again."""
        try:
            slurm.ask(["scancel", "-s", name, self._ranks()], _ASK_SECONDS)
        except SlurmError as error:
            raise NoTargetError(str(error)) from error
        return True

    def _with_ranks_dead(self, meanwhile: Callable[[Path], None]) -> bool:
        """Kill all ranks and call `meanwhile` with the checkpoints; return True."""
        self._signal_ranks("KILL")
        meanwhile(self.run.path / "checkpoints")
        return True

    def _on_main_node(self, script: str, starts_again: bool = False) -> bool:
        """Run a line of shell on the node of rank 0, with its PID in $PID; return `starts_again`."""
        claim = self.run.claim()
        pid = int(claim["owner"]["pid"])
        # srun rejects the ID of an array task
        job = slurm.show_job(self._job(), _ASK_SECONDS).get("JobId", "")
        line = ["srun", "--overlap", f"--jobid={job}", "-N1", "-n1", "-w", str(claim["owner"]["host"]), "--mem=0", "--gres=none"]
        try:
            slurm.ask([*line, "sh", "-c", f"PID={pid}; {script}"], _ASK_SECONDS)
        except SlurmError as error:
            raise NoTargetError(str(error)) from error
        return starts_again

    # Faults. Each returns whether the run has to start again.

    def kill_the_command(self, draw: random.Random) -> bool:
        """Kill the command that submitted the run and watches it; `keep_alive` runs it again."""
        os.killpg(self._command.pid, signal.SIGKILL)
        self._command.wait()
        return False

    def requeue(self, draw: random.Random) -> bool:
        """Requeue the job, as an administrator does, or Slurm at a preemption."""
        slurm.ask(["scontrol", "requeue", self._job()], _ASK_SECONDS)
        return True

    def lose_the_node(self, draw: random.Random) -> bool:
        """Set the node down, which ends its jobs at once, and put it back."""
        node = str(self.run.claim()["owner"]["host"])
        users = re.findall(r"user=(\S+)", slurm.ask(["squeue", "-h", "-w", node, "-o", "user=%u"], _ASK_SECONDS))
        if set(users) - {getpass.getuser()}:
            raise NoTargetError("a node without jobs of others")
        slurm.ask(["scontrol", "update", f"nodename={node}", "state=down", "reason=drill"], _ASK_SECONDS)
        try:
            time.sleep(_PAUSE_SECONDS)
        finally:
            slurm.ask(["scontrol", "update", f"nodename={node}", "state=resume"], _ASK_SECONDS)
        return True

    def show_checkpoint_late(self, draw: random.Random) -> bool:
        """Kill all ranks and hide the newest checkpoint for a while, as NFS may."""
        self._signal_ranks("KILL")
        time.sleep(_PAUSE_SECONDS)
        hidden = file_faults.hide_newest(self.run.path / "checkpoints", self._runs_dir / "not-yet-seen")
        time.sleep(draw.uniform(2, 20))
        file_faults.show_again(hidden, self.run.path / "checkpoints")
        return True

    def make_read_only(self, draw: random.Random) -> bool:
        """Set the modes of the run's folders to 0555."""
        with file_faults.read_only(self.run.path):
            time.sleep(draw.uniform(1, 4))
        return False

    @property
    def faults(self) -> dict[str, Callable[[random.Random], bool]]:
        """Return the faults possible here, by name."""
        a_loader = "set -- $(cat /proc/$PID/task/$PID/children); kill -9 $1"
        # Writes of rank 0 beyond a file size then fail.
        full = f"prlimit --pid $PID --fsize={_FULL_AT_BYTES}:; sleep 2; prlimit --pid $PID --fsize=unlimited:"
        found: dict[str, Callable[[random.Random], bool]] = {
            # As a preemption does: the ranks save, and the job is requeued.
            "SIGTERM with a grace period": lambda _: self._signal_ranks("TERM"),
            "SIGKILL of a rank": lambda _: self._on_main_node("kill -9 $PID", starts_again=True),
            # The job stays, and its supervisor starts another step.
            "SIGKILL of all ranks": lambda _: self._signal_ranks("KILL"),
            "SIGKILL of the command": self.kill_the_command,
            "SIGKILL of a loader process": lambda _: self._on_main_node(a_loader),
            "requeue": self.requeue,
            "checkpoint truncated": lambda draw: self._with_ranks_dead(lambda folder: file_faults.truncate(folder, draw)),
            "bit of a checkpoint flipped": lambda draw: self._with_ranks_dead(lambda folder: file_faults.flip_a_bit(folder, draw)),
            "checkpoint seen late": self.show_checkpoint_late,
            "disk full for a while": lambda _: self._on_main_node(full),
            "node loss": self.lose_the_node,
            "folder read-only for a while": self.make_read_only,
        }
        return {name: fault for name, fault in found.items() if name not in self.left_out}

    @cached_property
    def left_out(self) -> dict[str, str]:
        """Return the faults left out here, each with the reason."""
        out = {"clock moved back": "only an administrator can set a node's clock; the drill on this machine covers it"}
        out["suspended owner"] = "Slurm vouches for the processes of a running job; the drill on this machine covers it"
        if os.geteuid() == 0:
            out["folder read-only for a while"] = "root ignores file modes"
        if not _may_down_nodes():
            out["node loss"] = "taking a node down needs an operator's rights"
        return out


def _may_down_nodes() -> bool:
    """Return whether this user is Slurm's own, as on a private cluster."""
    try:
        return slurm.controller_parameter("SlurmUser").startswith(f"{getpass.getuser()}(")
    except SlurmError:
        return False
