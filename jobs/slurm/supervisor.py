"""`python -m jobs.slurm.supervisor [OPTIONS] -- srun ...`: keep a Slurm job running.

It runs the command, inside the job, and acts on its exit status:
  0              the job is done
  200            the run was asked to stop: requeue the job, unless Slurm has done so or ended it
  201            its node is at fault: requeue the job, which avoids that node from now on
  anything else  a rank died: run the command again in place, on the same nodes, but not forever
With --nodes FOLDER, a job whose setup fails, or whose ranks die before they begin a trial, moves to
another node too: see jobs/slurm/nodes.py. A run that hangs writes its stacks to the log, and starts
again in place: see jobs/slurm/hangs.py.
A cancelled job stays cancelled. If the ranks do not stop in time, the job is requeued just before
its limit, after which Slurm would end it for good. Where Slurm does not requeue the job, it ends at
once, and the module given by --successor submits another one. That module also runs when the
command has ended with 0, since other work may be left: it submits jobs for it, or says with the
exit status AGAIN that this job should run its command once more.
"""

import argparse
import contextlib
import datetime
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from jobs.cli import INTERRUPTED, MOVED, STOP_SIGNALS, STOPPED, Parser, refused
from jobs.slurm import clients
from jobs.slurm.clients import hosts
from jobs.slurm.hangs import DUMP_SIGNAL, StepWatch, pointer
from jobs.slurm.limits import is_cancelled_by_preemption
from jobs.slurm.nodes import Fault, FaultKind, Nodes, this_node
from jobs.slurm.queue import SlurmError, ask, exclude, own_job, show_job
from jobs.slurm.refusals import may_pass

# Consecutive deaths, each within QUICK_SECONDS of its start, before the job is given up. A faulty
# trial ends sooner: after two deaths without a new step, the next start records it as failed.
DEATHS_ALLOWED = 4
QUICK_SECONDS = 600.0
PAUSE_SECONDS = 2.0
# Slurm ends a job that it has requeued or cancelled within KillWait, 30 s by default.
KILLED_WITHIN_SECONDS = 600.0
_SHORTEST_MARGIN_SECONDS = 5.0
_EXCLUDE_ATTEMPTS = 3
_HUNG_SECONDS = 60.0  # that the ranks of a hung run have to end
_ENDING_SECONDS = 30.0  # that srun then has to end them
_SIGNALLED = 128  # the exit status of what a signal has ended is higher
_ASK_LIMIT_SECONDS = 300.0
AGAIN = 3  # exit status of a successor that submitted nothing: more is to be done in this job
_REFUSALS = 3  # of a requeue, in a row, before Slurm is believed
_SUCCESSOR_SECONDS = 300.0  # it ends by itself much sooner


def say(text: str) -> None:
    """Print one line to the job's log."""
    print(f"{datetime.datetime.now():%F %T} supervisor: {text}", flush=True)


def job_state(job: str) -> str:
    """Return the job's Slurm state; block until the controller answers."""
    while True:
        try:
            return show_job(job).get("JobState", "")
        except SlurmError as error:
            say(f"asking again: {error}")
            time.sleep(PAUSE_SECONDS)


def seconds_left(job: str) -> float:
    """Return the seconds until the job's limit, or infinity without one or without a time."""
    try:
        end = show_job(job, patience_seconds=10).get("EndTime", "")
        return (datetime.datetime.strptime(end, "%Y-%m-%dT%H:%M:%S") - datetime.datetime.now()).total_seconds()
    except (SlurmError, ValueError):
        return float("inf")


def can_requeue(job: str) -> bool:
    """Return whether the job may be requeued, as far as Slurm says: a site may forbid it."""
    try:
        return show_job(job, patience_seconds=10).get("Requeue") != "0"
    except SlurmError:
        return True


def requeue(job: str, avoid: Sequence[str] = ()) -> bool:
    """Requeue the job, off the nodes to `avoid`, and wait for Slurm to end this start of it.

    Return False if Slurm never will, and True as well if it has ended or requeued the job itself.
    """
    if not can_requeue(job):
        say("this site does not requeue the job")
        return False
    refused = 0
    # Nothing is left to save: SIGTERM, perhaps sent before scontrol returns, may end the wait.
    ended: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: ended.append(number))
    while True:
        try:
            ask(["scontrol", "requeue", job], patience_seconds=0)
            break
        except SlurmError as error:
            if job_state(job) != "RUNNING":
                return True
            refused = 0 if may_pass(str(error)) else refused + 1
            if refused >= _REFUSALS:
                say(f"Slurm does not requeue the job: {error}")
                return False
            say(f"requeueing again: {error}")
            time.sleep(PAUSE_SECONDS)
    if avoid:
        keep_off(job, avoid)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if not ended:
        time.sleep(KILLED_WITHIN_SECONDS)
    return True


def keep_off(job: str, nodes: Sequence[str]) -> None:
    """Exclude `nodes` for the requeued job, or hold it."""
    for left in reversed(range(_EXCLUDE_ATTEMPTS)):  # Slurm's SIGTERM to this start of the job also ends scontrol
        try:
            return exclude(job, nodes)
        except SlurmError as error:
            if left:
                continue
            say(f"job {job} is held, since Slurm cannot keep it off {', '.join(nodes)} ({error}); to release it: scontrol release {job}")
            ask(["scontrol", "hold", job])


class Supervisor:
    """Runner of one command in one job until it is done, or the job is requeued or given up."""

    def __init__(
        self, command: Sequence[str], job: str, margin_seconds: float, successor: Sequence[str] = (), nodes: Path | None = None
    ) -> None:
        """Take the command, the job, and the seconds before its limit at which it is requeued.

        `successor` are the module and the argument of what submits the rest, or empty; `nodes` is
        the folder of faults.
        """
        self.command, self.job, self.margin = list(command), job, margin_seconds
        self.successor, self.nodes = list(successor), nodes
        self.asked_to_stop = False
        self.hung = ("", 0, "")  # run ID, attempt and cause, of the last attempt

    def move(self, cause: str = "", here: Sequence[str] = ()) -> bool:
        """Requeue the job if its node is to be avoided; return False, after one line, if it is not.

        `cause` is why no trial could begin `here`, by default on any node of the job. It is recorded
        first.
        """
        if self.nodes is None:
            return False
        known, here = Nodes(self.nodes), list(here) or hosts(os.environ.get("SLURM_JOB_NODELIST", "")) or [this_node()]
        if cause:
            known.record(Fault(f"job {self.job}", 0, self.job, here, FaultKind.setup, cause, time.time()))
        avoid = known.avoided()
        if not avoid.keys() & set(here):
            if cause:
                why = "no other node is known" if known.total < 2 else "the same happened on another node, or too many are avoided"
                say(f"{cause} on {', '.join(here)}; {why}, so the job ends")
            return False
        say(f"node {', '.join(avoid.keys() & set(here))} is at fault, requeueing {self.job} off it")
        # Those of the array that wait, before this node is free. Slurm complains of those that do not.
        with contextlib.suppress(SlurmError):
            exclude(self.job.partition("_")[0], list(avoid))
        if not requeue(self.job, list(avoid)):
            self.call_successor("--stopped")
        return True

    def note(self, number: int, _frame: FrameType | None) -> None:
        """Note a stop signal without stopping: this process must outlive its ranks."""
        self.asked_to_stop = True

    def attempt(self) -> int | None:
        """Run the command; return its exit status, or None if the job's limit came first.

        A run that hangs is ended, once its ranks have written their stacks to the log.
        """
        self.hung = ("", 0, "")
        if self.nodes is None:
            return self._wait(clients.start(self.command), None)
        now = pointer(self.nodes.parent, self.job)
        with contextlib.suppress(OSError):
            now.unlink(missing_ok=True)  # of an attempt that was killed
        with contextlib.closing(StepWatch(now)) as watch:
            return self._wait(clients.start(self.command), watch)

    def _wait(self, child: "subprocess.Popen[bytes]", watch: StepWatch | None) -> int | None:
        asked = time.monotonic()
        deadline = asked + seconds_left(self.job) - self.margin
        while True:
            try:
                status = child.wait(timeout=1)
                return 128 - status if status < 0 else status
            except subprocess.TimeoutExpired:
                if watch is not None and (found := watch.hung())[0]:
                    self.hung = found
                    return self.end_hung(child)
                if time.monotonic() < min(deadline, asked + _ASK_LIMIT_SECONDS):
                    continue
            asked = time.monotonic()
            # The limit may have been changed.
            deadline = asked + seconds_left(self.job) - self.margin
            if time.monotonic() >= deadline:
                return None

    def call_successor(self, *why: str) -> bool:
        """Let the successor submit what is left to do; return whether this job should go on itself."""
        if not self.successor:
            return False
        try:
            words = [sys.executable, "-u", "-m", *self.successor, *why]
            return subprocess.run(words, timeout=_SUCCESSOR_SECONDS, check=False).returncode == AGAIN
        except subprocess.TimeoutExpired:
            return False

    def goes_on(self, since: float) -> bool:
        """Call the successor after a command that ended well; return whether to run it once more in this job."""
        again = self.call_successor("--ended-since", f"{since:.3f}")
        return again and not self.asked_to_stop and seconds_left(self.job) > 10 * self.margin

    def end_hung(self, child: "subprocess.Popen[bytes]") -> int:
        """Let all ranks write their stacks and end; return the exit status of the command."""
        say(f"{self.hung[2]}: the run hangs; the stacks of its ranks follow, and they are ended")
        # A stopped rank gets the signal when it continues.
        for number in (DUMP_SIGNAL, signal.SIGCONT):
            with contextlib.suppress(SlurmError):
                ask(["scancel", f"--signal={int(number)}", self.job], patience_seconds=30)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=_HUNG_SECONDS)
        if child.poll() is None:
            child.terminate()  # srun ends its step, which a killed one could not
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=_ENDING_SECONDS)
        child.kill()
        status = child.wait()
        assert self.nodes is not None
        here = hosts(os.environ.get("SLURM_JOB_NODELIST", "")) or [this_node()]
        trial, attempt, cause = self.hung
        Nodes(self.nodes).record(Fault(trial, attempt, self.job, here, FaultKind.hang, cause, time.time()))
        return (128 - status if status < 0 else status) or 1

    def leave(self, status: int) -> int:
        """Move the job, whose setup ended with `status`, to another node; return its exit status."""
        # A signal is Slurm's or a person's: the job was cancelled, preempted or is at its limit.
        if status > _SIGNALLED or job_state(self.job) != "RUNNING":
            return status
        # A batch script runs on the first node of its job.
        return INTERRUPTED if self.move(f"the setup of the job ended with status {status}", [this_node()]) else status

    def run(self) -> int:
        """Supervise the command; return the exit status of the job."""
        deaths = 0
        if self.move():
            return INTERRUPTED
        while True:
            started, since = time.monotonic(), time.time()
            status = self.attempt()
            if status == 0:
                if not self.goes_on(since):
                    return 0
                say("more trials are left than jobs may be queued: taking the next one")
                deaths = 0
                continue
            state = job_state(self.job)
            if state != "RUNNING":
                say(f"status {status}; the job is {state}: Slurm decides what comes next")
                if self.successor and is_cancelled_by_preemption(self.job):
                    self.call_successor("--stopped")
                return INTERRUPTED
            if status is None or status == STOPPED or self.asked_to_stop:
                say("stopped before the time limit" if status is None else f"status {status}, asked to stop: requeueing {self.job}")
                if not requeue(self.job):
                    self.call_successor("--stopped")
                return INTERRUPTED
            if (status == MOVED or self.hung[0]) and self.move():
                return INTERRUPTED
            deaths = deaths + 1 if time.monotonic() - started < QUICK_SECONDS else 1
            if deaths >= DEATHS_ALLOWED:
                said = f"status {status}: died {deaths} times in a row"
                if self.move(said):
                    return INTERRUPTED
                say(f"{said}, giving up")
                return status
            say(f"status {status}: a rank died, starting again in place")
            time.sleep(PAUSE_SECONDS)


_ABOUT = "Run a command inside a Slurm job. Start it again if a rank dies; requeue the job if the run was stopped."
_EXAMPLE = "example:\n  python -m jobs.slurm.supervisor --stop-signal-seconds 120 -- srun python -m jobs.pretrain"


def main() -> int:
    """Parse the command line, with the command after --, and supervise it."""
    parser = Parser(prog="python -m jobs.slurm.supervisor", description=_ABOUT, epilog=_EXAMPLE)
    group = parser.add_argument_group("what to run")
    signal_help = "seconds before the time limit at which Slurm tells the run to stop"
    group.add_argument("--stop-signal-seconds", type=float, required=True, metavar="S", help=signal_help)
    successor_help = "module, and its argument, that submits what is left to do"
    group.add_argument("--successor", nargs=2, default=[], metavar=("MODULE", "ARGUMENT"), help=successor_help)
    group.add_argument("--nodes", type=Path, metavar="FOLDER", help="where faults of nodes are recorded (default: none are)")
    group.add_argument("--setup-failed", type=int, metavar="STATUS", help="run nothing: the setup of the job ended with STATUS")
    group.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="command to run, such as srun ...")
    try:
        asked = parser.parse_args()
    except ValueError as error:
        return refused(error)
    command = asked.command[1:] if asked.command[:1] == ["--"] else asked.command
    margin = max(_SHORTEST_MARGIN_SECONDS, min(60.0, asked.stop_signal_seconds / 4))
    supervisor = Supervisor(command, own_job(), margin, asked.successor, asked.nodes)
    for number in STOP_SIGNALS:
        signal.signal(number, supervisor.note)
    return supervisor.run() if asked.setup_failed is None else supervisor.leave(asked.setup_failed)


if __name__ == "__main__":
    sys.exit(main())
