"""Query Slurm about our jobs. Silence is never taken for the end of a job."""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jobs.slurm.nodes import hosts

# These states end a job for good, unless Slurm or somebody requeues it.
ENDED = frozenset(
    {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"}
)
GONE = "GONE"  # Slurm answered and no longer knows the job
_PASSING = re.compile(
    "contact slurm|timed out|time out|connect|communicat|zero bytes|temporarily|unreachable|socket|authentication|try again|standby"
    "|unexpected|exit status 124",
    re.I,
)
# sinfo's short states; an asterisk marks a node that does not answer.
_OUT_OF_USE = re.compile(r"down|drain|drng|fail|maint|unk|inval|.*\*$")
_TIMEOUT_SECONDS = 60
_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 1.0, 15.0
# The person or the run caused these. Jobs in other states may be requeued after they were recorded.
_FINAL = frozenset({"CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "OUT_OF_MEMORY", "TIMEOUT"})


class SlurmError(RuntimeError):
    """Slurm refused a request, or did not answer within the time allowed."""


class SlurmSilentError(SlurmError):
    """Slurm did not answer; nothing is known."""


def may_pass(said: str) -> bool:
    """Return whether a Slurm error message blames an absent controller, not the request."""
    return bool(_PASSING.search(said))


def has_slurm() -> bool:
    """Return whether Slurm's commands are installed here."""
    return shutil.which("squeue") is not None


def site_tool(name: str) -> str:
    """Return the output of a site command such as sbalance or squota, or "" if it fails."""
    try:
        return subprocess.run([name], capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=True).stdout.rstrip()
    except (OSError, subprocess.SubprocessError):
        return ""


def ask(command: Sequence[str], patience_seconds: float = 120.0) -> str:
    """Return the output of `command`; retry with growing pauses while Slurm does not answer.

    Raise SlurmSilentError after `patience_seconds`, and SlurmError at once if Slurm refuses.
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
    """One job, or one task of a job array, as squeue lists it."""

    id: str  # 17, or 17_3 for an array task, as scancel and scontrol take it
    state: str
    restarts: int
    reason: str
    node: str
    name: str

    @property
    def ended(self) -> bool:
        """Return whether the job has run for the last time, as far as Slurm knows."""
        return self.state in ENDED

    @property
    def array(self) -> str:
        """Return the job ID of its array."""
        return self.id.partition("_")[0]


_FIELDS = ("JobArrayID", "State", "RestartCnt", "Reason", "NodeList", "Name")


def _parse(line: str) -> Element:
    array_id, state, restarts, reason, node, name = line.removesuffix("|").split("|", 5)
    return Element(array_id, state, int(restarts or 0), reason, node, name)


class Queue:
    """Our jobs, with at most one request to Slurm every `refresh_seconds`."""

    def __init__(self, refresh_seconds: float = 5.0, patience_seconds: float = 120.0) -> None:
        self._refresh, self._patience = refresh_seconds, patience_seconds
        self._looked = float("-inf")
        self._elements: dict[str, Element] = {}
        self._answered = False
        self._final: dict[str, str] = {}  # final states, from the accounting
        self._accounted: dict[str, str] = {}  # the accounting's answers since the last look
        self.silent = False  # whether the last request got no answer

    def elements(self) -> Mapping[str, Element]:
        """Return our jobs by ID, including recently ended ones.

        While Slurm is silent, return its last answer; raise SlurmSilentError if there is none yet.
        """
        if time.monotonic() - self._looked < self._refresh:
            return self._known()
        self._accounted.clear()
        command = ["squeue", "--me", "-r", "-t", "all", "-h", "-O", ",".join(f"{f}:|" for f in _FIELDS)]
        try:
            lines = ask(command, self._patience).splitlines()
        except SlurmError:
            # Slurm cannot refuse a request for all jobs, so any error means that nothing is known.
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
        """Return the jobs whose names start with `prefix`."""
        return [e for e in self.elements().values() if e.name.startswith(prefix)]

    def state(self, job: str) -> str:
        """Return a job's state, GONE if Slurm no longer lists it, or "" if nothing is known now."""
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
        """Return how often a listed job was requeued, or None."""
        found = self.elements().get(job)
        return None if found is None else found.restarts


def accounted_state(job: str) -> str:
    """Return the state on record, "" without record or accounting, "?" without an answer."""
    try:
        out = ask(["sacct", "-X", "-n", "-P", "-S", "now-60days", "-j", job, "-o", "State"], patience_seconds=0)
    except SlurmError as error:
        return "" if "disabled" in str(error) else "?"
    return next(iter(out.split()), "")


def show_job(job: str, patience_seconds: float = 120.0) -> dict[str, str]:
    """Return scontrol's fields of one job or array task, by key."""
    out = ask(["scontrol", "show", "job", "-o", job], patience_seconds)
    return dict(word.split("=", 1) for word in out.split() if "=" in word)


def controller_parameter(name: str) -> str:
    """Return a parameter of the controller, such as MaxArraySize."""
    match = re.search(rf"^{name}\s*=\s*(.*)$", ask(["scontrol", "show", "config"], 30), re.M)
    return match[1].strip() if match else ""


def cancel(jobs: Sequence[str]) -> None:
    """End `jobs`, which may be arrays or array tasks. Jobs that have ended are skipped."""
    if jobs:
        ask(["scancel", "--quiet", *jobs])


def exclude(job: str, nodes: Sequence[str]) -> None:
    """Keep a pending job, or the pending tasks of an array, off `nodes` and off what this job excludes."""
    known = show_job(own_job()).get("ExcNodeList", "(null)")
    listed = dict.fromkeys([*(hosts(known) if known != "(null)" else []), *nodes])
    ask(["scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(listed)}"])


def nodes_of(partition: str, nodelist: str = "") -> list[str]:
    """Return the nodes of a partition ("": the default one) that can run jobs, or those of `nodelist`.

    Return none if Slurm does not say.
    """
    options = [*(["-p", partition] if partition else []), *(["-n", nodelist] if nodelist else [])]
    try:
        lines = ask(["sinfo", "-h", "-N", "-o", "%N|%P|%t", *options], patience_seconds=30).splitlines()
    except SlurmError:
        return []
    found = [line.split("|") for line in lines if line.count("|") == 2]
    return sorted({name for name, part, state in found if (partition or part.endswith("*")) and not _OUT_OF_USE.match(state)})


def own_job(environment: Mapping[str, str] = os.environ) -> str:
    """Return the ID of the job that this process runs in, or "" outside Slurm."""
    # The last task of an array has the array's own ID; a requeue of it would hit the whole array.
    if "SLURM_ARRAY_JOB_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment.get("SLURM_JOB_ID", "")


def own_restart(environment: Mapping[str, str] = os.environ) -> int:
    """Return how often the job that this process runs in was requeued."""
    return int(environment.get("SLURM_RESTART_COUNT", "0"))
