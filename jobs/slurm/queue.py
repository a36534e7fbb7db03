"""Query Slurm about our jobs. Silence or an empty answer is never taken for the end of a job."""

import contextlib
import datetime
import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jobs.slurm import clients
from jobs.slurm.refusals import is_refusal, may_pass

# These states end a job for good, unless Slurm or a person requeues it.
ENDED = frozenset(
    {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"}
)
GONE = "GONE"  # Slurm no longer knows the job, at a second look too
UNLISTED = "UNLISTED"  # Slurm answered without the job, which proves nothing yet
# A job is gone if it is missing from all answers for so long: from those that list jobs or at least
# name the columns, or from answers with nothing in them, which a failing client gives too.
SECOND_LOOK_SECONDS, EMPTY_SECONDS = 10.0, 60.0
_CLOCKS_SECONDS = 600.0  # by which two clocks of a site may differ
_EMPTY_TRIES = 5  # of a question whose answer is never empty
_UNKNOWN_TRIES = 3  # of a command that fails with words that are no known refusal
# sinfo's states; an asterisk marks a node that does not answer.
_OUT_OF_USE = re.compile(r"down|drain|fail|future|inval|maint|unknown|.*\*$")
_NODE_LINE = re.compile(r"([\w.-]+)\|([\w.-]+\*?)\|([a-z_+]+[*~#!%$@^-]?)$", re.M)  # other lines are a site's
_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 1.0, 15.0
# The person or the run caused these. Jobs in other states may be requeued after they were recorded.
_FINAL = frozenset({"CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "OUT_OF_MEMORY", "TIMEOUT"})


class SlurmError(RuntimeError):
    """Slurm refused a request, or did not answer within the time allowed."""


class SlurmSilentError(SlurmError):
    """Slurm did not answer; nothing is known."""


def has_slurm() -> bool:
    """Return whether Slurm's commands are installed here."""
    return shutil.which("squeue") is not None


def site_tool(name: str) -> str:
    """Return the output of a site command such as sbalance or squota, or "" if it fails."""
    try:
        done = clients.run([name])
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "" if done.returncode else done.stdout.rstrip()


def ask(command: Sequence[str], patience_seconds: float = 120.0) -> str:
    """Return the output of `command`; retry with growing pauses while Slurm does not answer.

    Raise SlurmSilentError after `patience_seconds`, and SlurmError at once if Slurm refuses. Words
    that are neither silence nor a known refusal are an error after a few tries.
    """
    deadline, pause, unknown = time.monotonic() + patience_seconds, _FIRST_WAIT_SECONDS, 0
    while True:
        try:
            done = clients.run(command)
            said = clients.complaint(done.stderr)
            if done.returncode == 0:
                return done.stdout
            unknown += not may_pass(said)
            last = unknown >= _UNKNOWN_TRIES or time.monotonic() + pause > deadline
            if is_refusal(said) or (last and not may_pass(said)):
                raise SlurmError(f"{command[0]}: {said or f'exit status {done.returncode}'}")
        except subprocess.TimeoutExpired:
            said = f"no answer in {clients.TIMEOUT_SECONDS:.0f} s"
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
    submitted: str = ""  # Slurm's time, without a zone; a requeue changes it
    start: str = ""  # of a waiting job, when Slurm expects it to start; "" or N/A if it does not know

    @property
    def ended(self) -> bool:
        """Return whether the job has run for the last time, as far as Slurm knows."""
        return self.state in ENDED

    @property
    def array(self) -> str:
        """Return the job ID of its array."""
        return self.id.partition("_")[0]

    def is_older_than(self, when: float) -> bool:
        """Return whether the job was submitted before `when`, in seconds since 1970, as far as known.

        Clocks may differ by some minutes.
        """
        try:
            return datetime.datetime.fromisoformat(self.submitted).timestamp() < when - _CLOCKS_SECONDS
        except ValueError:
            return False


_FIELDS = ("JobArrayID", "State", "RestartCnt", "Reason", "NodeList", "Name", "SubmitTime", "StartTime")
_TIME = r"\d{4}-\d\d-\d\dT[\d:]+|N/A|NONE|Unknown|"
# Other lines, and what stands before the job's number, are a site's.
_LISTED = re.compile(rf"(\d+(?:_\w+|_\[[^|]*\])?)\|([A-Z_]+)\|(\d*)\|([^|]*)\|([^|]*)\|(.*?)\|(?:({_TIME})\|({_TIME})\|)?$")
_COLUMNS = re.compile(r"JOB\w*\|STATE\|")  # what squeue prints above its list, also if that is empty


def _parse(lines: Sequence[str]) -> dict[str, Element]:
    rows = [found.groups(default="") for found in map(_LISTED.search, lines) if found]
    return {job: Element(job, state, int(restarts or 0), *rest) for job, state, restarts, *rest in rows}


class Queue:
    """Our jobs, with at most one request to Slurm every `refresh_seconds`."""

    def __init__(self, refresh_seconds: float = 5.0, patience_seconds: float = 120.0) -> None:
        self._refresh, self._patience = refresh_seconds, patience_seconds
        self._looked = float("-inf")
        self._elements: dict[str, Element] = {}
        self._answered = False
        self._proves = False  # whether the last answer was more than nothing
        # job, array or name -> time of the first of the answers in a row that lack it
        self._missed: dict[str, float] = {}
        self._final: dict[str, str] = {}  # final states, from the accounting
        self._accounted: dict[str, str] = {}  # the accounting's answers since the last look
        self._over: set[str] = set()  # arrays that are gone, or of which the accounting has every end
        self._cluster, self._named = "", float("nan")  # the name, and the look at which it was asked for
        self.silent = False  # whether the last request got no answer

    def look_again(self) -> None:
        """Ask Slurm again at the next question; what is known of missing jobs is kept."""
        self._looked = float("-inf")

    def elements(self) -> Mapping[str, Element]:
        """Return our jobs by ID, including recently ended ones.

        A job that was listed stays so until it is gone. While Slurm is silent, return its last
        answer; raise SlurmSilentError if there is none yet.
        """
        if time.monotonic() - self._looked < self._refresh:
            return self._known()
        self._accounted.clear()
        command = ["squeue", "--me", "-r", "-t", "all", "-O", ",".join(f"{f}:|" for f in _FIELDS)]
        try:
            lines = ask(command, self._patience).splitlines()
        except SlurmError:
            # Slurm cannot refuse a request for all jobs, so any error means that nothing is known.
            self.silent = True
        else:
            self._take_up(lines)
        self._looked = time.monotonic()
        return self._known()

    def _take_up(self, lines: Sequence[str]) -> None:
        listed, now = _parse(lines), time.monotonic()
        self.silent, self._answered = False, True
        self._proves = bool(listed) or any(map(_COLUMNS.search, lines))
        seen = {key for e in listed.values() for key in (e.id, e.array, e.name)}
        self._missed = {key: since for key, since in self._missed.items() if key not in seen}
        missing = {job: e for job, e in self._elements.items() if job not in listed and not e.ended}
        self._elements = listed | {job: e for job, e in missing.items() if not self.is_gone(job, now)}

    def is_gone(self, key: str, now: float | None = None) -> bool:
        """Return whether a job, an array or all jobs of a name were missing at a second look too.

        Call this only for what the last answer lacks.
        """
        now = self._looked if now is None else now
        since = self._missed.setdefault(key, now)
        return not self.silent and now - since >= (SECOND_LOOK_SECONDS if self._proves else EMPTY_SECONDS)

    def expect(self, name: str) -> None:
        """Forget that jobs of that name were missing: some are about to be submitted."""
        self._missed.pop(name, None)

    def in_doubt(self, arrays: Mapping[str, tuple[str, float]]) -> set[str]:
        """Return those of `arrays` that may be queued although Slurm lists no element of them.

        `arrays` has the name of each job ID and the seconds since its submission. The accounting or
        a second look later takes the doubt away. A young job may just not be listed yet.
        """
        listed = {(e.array, e.name) for e in self.elements().values()}
        missing = {job: name for job, (name, _) in arrays.items() if (job, name) not in listed and job not in self._over}
        if missing:
            self._over |= accounted_over(missing)
        self._over |= {job for job in missing if self.is_gone(job) and arrays[job][1] > EMPTY_SECONDS}
        return missing.keys() - self._over

    def _known(self) -> Mapping[str, Element]:
        if not self._answered:
            raise SlurmSilentError("squeue: no answer yet")
        return self._elements

    def named(self, prefix: str) -> list[Element]:
        """Return the jobs whose names start with `prefix`."""
        return [e for e in self.elements().values() if e.name.startswith(prefix)]

    def state(self, job: str, name: str = "") -> str:
        """Return a job's state, UNLISTED or GONE without one, or "" if nothing is known now.

        Numbers come again after years, or after a reinstallation. With `name`, a job of another
        name is not the one that is meant.
        """
        if job in self._final:
            return self._final[job]
        try:
            found = self.elements().get(job)
        except SlurmSilentError:
            return ""
        if found is not None and name in ("", found.name):
            return found.state
        if found is not None:
            return GONE
        if self.silent:
            return ""
        if job not in self._accounted:
            self._accounted[job] = accounted_state(job, name)
        state = self._accounted[job]
        if state in _FINAL:
            self._final[job] = state
            return state
        if state == "?":
            return ""
        return GONE if self.is_gone(job) else UNLISTED

    @property
    def cluster(self) -> str:
        """Return the name of the cluster whose jobs these are, or "" if Slurm does not say."""
        if not self._cluster and self._named != self._looked:
            self._named = self._looked  # if it does not answer, not again before the next look
            with contextlib.suppress(SlurmError):
                self._cluster = os.environ.get("SLURM_CLUSTER_NAME") or controller_parameter("ClusterName", 5)
        return self._cluster

    def is_elsewhere(self, cluster: str) -> bool:
        """Return whether `cluster` is another one, whose jobs and numbers Slurm here does not know."""
        return bool(cluster and self.cluster) and cluster != self.cluster

    def restarts(self, job: str) -> int | None:
        """Return how often a listed job was requeued, or None."""
        found = self.elements().get(job)
        return None if found is None else found.restarts


def accounted_state(job: str, name: str = "") -> str:
    """Return the state on record, "" without record or accounting, "?" without an answer.

    With `name`, a record of a job of another name does not count.
    """
    try:
        out = ask(["sacct", "-X", "-n", "-P", "-S", "now-60days", "-j", job, "-o", "JobID,State,JobName"], patience_seconds=0)
    except SlurmError as error:
        return "" if "disabled" in str(error) else "?"
    rows = re.findall(rf"(?:^|\D){re.escape(job)}\|(\w+)[^|\n]*(?:\|(.*))?$", out, re.M)
    return next((state for state, named in rows if name in ("", named)), "")


def accounted_over(arrays: Mapping[str, str]) -> set[str]:
    """Return those of `arrays`, job ID -> name, of which the accounting has the end of every element."""
    command = ["sacct", "-X", "-n", "-P", "-S", "now-60days", "-j", ",".join(arrays), "-o", "JobID,JobName,State"]
    try:
        rows = re.findall(r"(\d+)(?:[_.+][^|\n]*)?\|([^|\n]*)\|([A-Z_]+)", ask(command, patience_seconds=0))
    except SlurmError:
        return set()
    states: dict[str, set[str]] = {}
    for array, name, state in rows:
        if arrays.get(array) == name:
            states.setdefault(array, set()).add(state)
    return {array for array, found in states.items() if found <= _FINAL}


def show_job(job: str, patience_seconds: float = 120.0) -> dict[str, str]:
    """Return scontrol's fields of one job or array task, by key.

    Raise SlurmSilentError at an answer without the job, which says nothing.
    """
    _, mark, out = ask(["scontrol", "show", "job", "-o", job], patience_seconds).partition("JobId=")
    out = mark + next(iter(out.splitlines()), "")  # the rest is a site's
    fields = dict(word.split("=", 1) for word in out.split() if "=" in word)
    if "JobState" not in fields:
        raise SlurmSilentError(f"scontrol: an answer without job {job}")
    return fields


def controller_parameter(name: str, patience_seconds: float = 30.0) -> str:
    """Return a parameter of the controller, such as MaxArraySize, or "" without it."""
    for _ in range(_EMPTY_TRIES):
        out = ask(["scontrol", "show", "config"], patience_seconds)
        if match := re.search(rf"^{name}\s*=\s*(.*)$", out, re.M):
            return match[1].strip()
        if "=" in out:
            break
        time.sleep(_FIRST_WAIT_SECONDS)
    return ""


def cancel(jobs: Sequence[str]) -> None:
    """End `jobs`, which may be arrays or array tasks. Jobs that have ended are skipped."""
    if jobs:
        ask(["scancel", "--quiet", *jobs])


def cancel_named(names: Sequence[str]) -> None:
    """End our jobs of these names, also those that Slurm does not list now."""
    for name in names:
        ask(["scancel", "--quiet", "--name", name])


def exclude(job: str, nodes: Sequence[str]) -> None:
    """Keep a pending job, or the pending tasks of an array, off `nodes` and off what this job excludes."""
    known = show_job(own_job()).get("ExcNodeList", "(null)")
    listed = dict.fromkeys([*(clients.hosts(known) if known != "(null)" else []), *nodes])
    ask(["scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(listed)}"])


def node_states(partition: str, nodelist: str = "") -> dict[str, str]:
    """Return the state of each node of a partition ("": the default one), or of those in `nodelist`.

    The dict is empty if Slurm does not say.
    """
    options = [*(["-p", partition] if partition else []), *(["-n", nodelist] if nodelist else [])]
    try:
        shown = ask(["sinfo", "-h", "-N", "-o", "%N|%P|%T", *options], patience_seconds=30)
    except SlurmError:
        return {}
    return {name: state for name, part, state in sorted(_NODE_LINE.findall(shown)) if partition or part.endswith("*")}


def is_out_of_use(state: str) -> bool:
    """Return whether a node in that state runs no jobs: it is down, drained, silent or the like."""
    return bool(_OUT_OF_USE.match(state))


def nodes_of(partition: str, nodelist: str = "") -> list[str]:
    """Return the nodes of `node_states` that can run jobs."""
    return [name for name, state in node_states(partition, nodelist).items() if not is_out_of_use(state)]


def own_job(environment: Mapping[str, str] = os.environ) -> str:
    """Return the ID of the job that this process runs in, or "" outside Slurm."""
    # The last task of an array has the array's own ID; a requeue of it would hit the whole array.
    if "SLURM_ARRAY_JOB_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment.get("SLURM_JOB_ID", "")


def own_restart(environment: Mapping[str, str] = os.environ) -> int:
    """Return how often the job that this process runs in was requeued."""
    return int(environment.get("SLURM_RESTART_COUNT", "0"))
