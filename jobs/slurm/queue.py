"""What Slurm says of our jobs. A controller that does not answer is asked again; its silence is never read as the end of a job."""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# What ends a job for good, unless Slurm or somebody requeues it.
ENDED = frozenset(
    {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"}
)
GONE = "GONE"  # Slurm answered, and knows the job no more
_PASSING = re.compile(
    "contact slurm|timed out|time out|connect|communicat|zero bytes|temporarily|unreachable|socket|authentication|try again|standby"
    "|unexpected|exit status 124",
    re.I,
)
_TIMEOUT_SECONDS = 60
_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 1.0, 15.0
# What a person or the run has ended; the others may be requeued after they were on record.
_FINAL = frozenset({"CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "OUT_OF_MEMORY", "TIMEOUT"})


class SlurmError(RuntimeError):
    """Slurm refused a request, or did not answer for as long as one was ready to wait."""


class SlurmSilentError(SlurmError):
    """Slurm did not answer; nothing is known."""


def may_pass(said: str) -> bool:
    """Whether what a Slurm command complained of is the controller's absence, and not the request."""
    return bool(_PASSING.search(said))


def has_slurm() -> bool:
    """Whether Slurm's commands are installed here."""
    return shutil.which("squeue") is not None


def site_tool(name: str) -> str:
    """What a command of the site prints, such as sbalance or squota; "" where there is none or it fails."""
    try:
        return subprocess.run([name], capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=True).stdout.rstrip()
    except (OSError, subprocess.SubprocessError):
        return ""


def ask(command: Sequence[str], patience_seconds: float = 120.0) -> str:
    """What `command` prints; tried again with growing pauses while Slurm does not answer.

    Raises SlurmSilentError when patience ends, SlurmError at once where Slurm answers with a refusal.
    """
    deadline, pause = time.monotonic() + patience_seconds, _FIRST_WAIT_SECONDS
    while True:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False)
            said = " ".join(done.stderr.split())
            if done.returncode == 0:
                return done.stdout
            if not may_pass(said):
                raise SlurmError(f"{command[0]}: {said or f'exit status {done.returncode}'}")
        except subprocess.TimeoutExpired:
            said = f"no answer in {_TIMEOUT_SECONDS} s"
        except OSError as error:
            raise SlurmError(f"{command[0]}: {error.strerror}") from error
        if time.monotonic() + pause > deadline:
            raise SlurmSilentError(f"{command[0]}: {said}")
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_WAIT_SECONDS)


@dataclass(frozen=True)
class Element:
    """One job, or one element of a job array, as squeue lists it."""

    id: str  # 17, or 17_3 for an array's element: what scancel and scontrol take
    state: str
    restarts: int
    reason: str
    node: str
    name: str

    @property
    def ended(self) -> bool:
        """Whether it has run for the last time, as far as Slurm knows."""
        return self.state in ENDED

    @property
    def array(self) -> str:
        """The number of its array."""
        return self.id.partition("_")[0]


_FIELDS = ("JobArrayID", "State", "RestartCnt", "Reason", "NodeList", "Name")


def _parse(line: str) -> Element:
    array_id, state, restarts, reason, node, name = line.removesuffix("|").split("|", 5)
    return Element(array_id, state, int(restarts or 0), reason, node, name)


class Queue:
    """Our jobs, asked of Slurm in one request at most every `refresh_seconds`."""

    def __init__(self, refresh_seconds: float = 5.0, patience_seconds: float = 120.0) -> None:
        self._refresh, self._patience = refresh_seconds, patience_seconds
        self._looked = float("-inf")
        self._elements: dict[str, Element] = {}
        self._answered = False
        self._final: dict[str, str] = {}  # told by the accounting, for good
        self._accounted: dict[str, str] = {}  # told by it since the last look
        self.silent = False  # whether the last request stayed without an answer

    def elements(self) -> Mapping[str, Element]:
        """Our jobs by id, those that ended lately too; while Slurm is silent, what it said last.

        Raises SlurmSilentError where it has said nothing yet.
        """
        if time.monotonic() - self._looked < self._refresh:
            return self._known()
        self._accounted.clear()
        command = ["squeue", "--me", "-r", "-t", "all", "-h", "-O", ",".join(f"{f}:|" for f in _FIELDS)]
        try:
            lines = ask(command, self._patience).splitlines()
        except SlurmError:  # a request for all jobs cannot be refused: whatever is said, nothing is known
            self.silent = True
        else:
            self.silent, self._answered = False, True
            self._elements = {e.id: e for e in map(_parse, (line for line in lines if line.count("|") >= len(_FIELDS)))}
        self._looked = time.monotonic()
        return self._known()

    def _known(self) -> Mapping[str, Element]:
        if not self._answered:
            raise SlurmSilentError("squeue: no answer yet")
        return self._elements

    def named(self, prefix: str) -> list[Element]:
        """Those whose name starts with `prefix`."""
        return [e for e in self.elements().values() if e.name.startswith(prefix)]

    def state(self, job: str) -> str:
        """The state of one job; GONE where Slurm answers and does not list it, "" where nothing can be known now."""
        if job in self._final:
            return self._final[job]
        try:
            found = self.elements().get(job)
        except SlurmSilentError:
            return ""
        if found is not None:
            return found.state
        if self.silent:
            return ""
        if job not in self._accounted:
            self._accounted[job] = accounted_state(job)
        state = self._accounted[job]
        if state in _FINAL:
            self._final[job] = state
            return state
        return "" if state == "?" else GONE

    def restarts(self, job: str) -> int | None:
        """How often a listed job was requeued."""
        found = self.elements().get(job)
        return None if found is None else found.restarts


def accounted_state(job: str) -> str:
    """The state that the accounting has on record, "" where there is none or no accounting, "?" where it does not answer."""
    try:
        out = ask(["sacct", "-X", "-n", "-P", "-S", "now-60days", "-j", job, "-o", "State"], patience_seconds=0)
    except SlurmError as error:
        return "" if "disabled" in str(error) else "?"
    words = out.split()
    return words[0] if words else ""


def show_job(job: str, patience_seconds: float = 120.0) -> dict[str, str]:
    """What scontrol shows of one job, array element or not, by key."""
    out = ask(["scontrol", "show", "job", "-o", job], patience_seconds)
    return dict(word.split("=", 1) for word in out.split() if "=" in word)


def controller_setting(name: str) -> str:
    """A setting of the controller, such as MaxArraySize."""
    match = re.search(rf"^{name}\s*=\s*(.*)$", ask(["scontrol", "show", "config"], 30), re.M)
    return match[1].strip() if match else ""


def cancel(jobs: Sequence[str]) -> None:
    """End `jobs`, which may be arrays, elements or both; those that have ended already are passed over."""
    if jobs:
        ask(["scancel", "--quiet", *jobs])


def own_job(environment: Mapping[str, str] = os.environ) -> str:
    """The id of the job that this process runs in, "" outside of Slurm.

    An array's last element bears the number of the whole array as SLURM_JOB_ID, and `scontrol requeue` would take it for the array.
    """
    if "SLURM_ARRAY_JOB_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment.get("SLURM_JOB_ID", "")


def own_restart(environment: Mapping[str, str] = os.environ) -> int:
    """How often the job that this process runs in was requeued."""
    return int(environment.get("SLURM_RESTART_COUNT", "0"))
