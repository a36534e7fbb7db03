"""Say why jobs wait, when Slurm expects them to start, and what to change if they never can."""

import contextlib
import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jobs.slurm.queue import Element, SlurmError, ask, show_job

NOT_SCHEDULED = "Slurm has not looked at it yet"
_ASK_SECONDS = 5.0
# Reasons (squeue(1), job_reason_codes) of jobs that wait until a person changes something.
_NEVER = {
    r"PartitionNodeLimit": "ask for fewer nodes (nodes_per_trial), or use another partition",
    r"PartitionTimeLimit": "lower time_limit_minutes, or use another partition",
    r"BadConstraints": "no node has what the job asks for: change sbatch.constraint, gres, memory or cores",
    r"(AccountNotAllowed|InvalidAccount)": "set account to one that may use the partition",
    r"(QOSNotAllowed|InvalidQOS)": "set qos to one that the account and the partition allow",
    r"DependencyNeverSatisfied": "cancel the job and run the sweep's command again",
    r"(Assoc|QOS)MaxWallDurationPerJobLimit": "lower time_limit_minutes",
    r"(Assoc|QOS)Max\w*PerJob\w*": "one job asks for more than the limit: lower what a trial takes, or use another qos",
    r"(Assoc|QOS)Max\w*PerNode\w*": "one job asks for more than the limit of a node: lower what a trial takes, or use another qos",
    r"QOSMin\w*": "the job asks for less than the qos requires: use another qos",
    r"(Assoc|QOS)Grp(?!\w*Run)\w*Minutes\w*": "the account's budget does not suffice: ask for more, or use another account",
}
_HELD = re.compile("held", re.I)  # JobHeldUser, JobHeldAdmin, launch failed requeued held
# Limits of all jobs together: a job waits for others, unless it alone asks for more.
_TOGETHER = re.compile(r"(Assoc|QOS)(Grp|Max)(?!\w*Minutes)(CPU|Cpu|GRES|Mem|Memory|Node|TRES|Billing)\w*", re.I)
_KINDS = {"cpu": "cpu", "gres": "gres/gpu", "mem": "mem", "memory": "mem", "node": "node", "billing": "billing"}
_UNITS = {"": 1.0, "K": 2.0**-10, "M": 1.0, "G": 2.0**10, "T": 2.0**20}


@dataclass(frozen=True)
class Waiting:
    """Jobs of one array that wait for the same reason."""

    jobs: list[str]
    reason: str  # Slurm's word
    start: str  # when Slurm expects the first to start, or ""
    remedy: str  # what to change, since the jobs can never start as they are; else ""

    @property
    def array(self) -> str:
        """Return the job ID of the array."""
        return self.jobs[0].partition("_")[0]

    @property
    def line(self) -> str:
        """Return 'job 7_3 waits: Priority, expected to start at 2026-11-29T10:00:00'."""
        several = len(self.jobs) > 1
        who = f"{len(self.jobs)} jobs of array {self.array}" if several else f"job {self.jobs[0]}"
        if _HELD.search(self.reason):
            return f"{who} {'are' if several else 'is'} held ({self.reason}); to release: {self.remedy}"
        waits = f"{who} {'wait' if several else 'waits'}"
        if self.remedy:
            return f"{waits} and cannot start: {self.reason}: {self.remedy}"
        return f"{waits}: {self.reason}" + (f", expected to start at {self.start}" if self.start else "")


def waiting(elements: Iterable[Element]) -> list[Waiting]:
    """Return why the pending ones of `elements` wait, by array and reason."""
    groups: dict[tuple[str, str], list[Element]] = {}
    for element in elements:
        if element.state == "PENDING":
            groups.setdefault((element.array, element.reason), []).append(element)
    found = []
    for (_, reason), alike in groups.items():
        starts = sorted(e.start for e in alike if e.start[:1].isdigit())
        shown = NOT_SCHEDULED if reason in ("None", "") else reason
        jobs = [e.id for e in alike]
        found.append(Waiting(jobs, shown, next(iter(starts), ""), remedy(reason, jobs)))
    return found


def remedy(reason: str, jobs: Sequence[str]) -> str:
    """Return what to change if `reason` never goes away by itself, else ""."""
    word, job = reason.split(",")[0].strip(), jobs[0]
    if _HELD.search(reason):
        return f"scontrol release {job if len(jobs) == 1 else ','.join(jobs)}"
    for pattern, text in _NEVER.items():
        if re.fullmatch(pattern, word):
            return text
    if word == "ReqNodeNotAvail" and (away := re.search(r"UnavailableNodes:(\S+)", reason)) and away[1] not in ("", "(null)"):
        return f"the nodes {away[1]} that it needs are down or drained: leave them out of sbatch.nodelist, or wait until they are back"
    if _TOGETHER.fullmatch(word):
        with contextlib.suppress(SlurmError):
            return _exceeded(word, job)
    return ""


@functools.lru_cache(maxsize=1000)
def _exceeded(word: str, job: str) -> str:
    """Return what to lower if the job alone asks for more than the limit that `word` names, else ""."""
    fields = show_job(job, _ASK_SECONDS)
    kind = next((tres for part, tres in _KINDS.items() if part in word.lower()), "")
    asked = tres_of(fields.get("ReqTRES") or fields.get("TRES", "")).get(kind, 0.0)
    if word.startswith("QOS"):
        where, names = ["qos", "where", f"name={fields.get('QOS', '')}"], "GrpTRES,MaxTRESPerUser,MaxTRESPerAccount"
    else:
        user = fields.get("UserId", "").partition("(")[0]
        where, names = ["assoc", "where", f"account={fields.get('Account', '')}", f"user={user},"], "GrpTRES,MaxTRES"
    rows = ask(["sacctmgr", "-n", "-P", "show", *where, f"format={names}"], _ASK_SECONDS).splitlines()
    limits = [tres_of(value)[kind] for row in rows for value in row.split("|") if kind in tres_of(value)]
    if limits and asked > min(limits):
        return f"the job asks for {asked:g} of {kind}, and the limit of all jobs together is {min(limits):g}: lower what a trial takes"
    return ""


def tres_of(text: str) -> dict[str, float]:
    """Parse cpu=4,mem=8G,gres/gpu=2 to numbers; memory is in MiB."""
    pairs = re.findall(r"([\w/:]+)=(\d+(?:\.\d+)?)([KMGT]?)", text)
    return {name: float(number) * (_UNITS[unit] if name == "mem" else 1.0) for name, number, unit in pairs}
