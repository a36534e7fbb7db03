"""Tell the faults of nodes from those of trials, and say which nodes new jobs avoid.

The folder `nodes` of a sweep holds one file per start that ended by a fault (`*.json`), the names
of the nodes that its jobs may use (`known.json`), and per node the time from which it worked or was
cleared (`NODE.good`, `NODE.cleared`). All decisions follow from these files and the clock.
"""

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path

from cnnjepa.run.files import create_exclusive, read_json, reading, sealed_json, write_atomic
from cnnjepa.run.typed import build, checked
from jobs.cluster import ClusterProfile
from jobs.slurm import queue as slurm
from jobs.slurm.clients import hosts

EXPIRY_HOURS = 24.0  # after which a fault no longer counts
SHARE = 0.5  # of the nodes that the jobs may use: never more are avoided
TRIALS_TO_SUSPECT = 2  # different trials that fail on a node and nowhere else
HANGS_TO_SUSPECT = 2  # on a node, of one trial or several
_TRIED = 3  # nodes that a trial may fail on, whatever is known of them
# Texts of drivers, devices and file systems.
_OF_A_NODE = re.compile(
    "|".join(
        (
            r"uncorrectable|\bECC error|NVML|\bXid\b|fallen off the bus|hardware error|NVIDIA driver|nvidia-smi has failed",
            r"no CUDA-capable device|sees no CUDA device|CUDA driver|CUDA unknown error|CUDA initialization|cuda[GS]etDevice",
            r"CUDA error: (system not yet initialized|initialization error|unspecified driver|device unavailable|the launch timed out)",
            r"CUDA-capable devices? (is|are) (busy|unavailable)|hipErrorNoDevice|no ROCm-capable device|no such device",
            r"stale (NFS )?file handle|transport endpoint is not connected|(input/output|\bI/O) error|read-only file system",
            r"not mounted|\bmount(ing)? (failed|error)|\bmount: |prolog (failed|error|hung)|failed prolog",
        )
    ),
    re.I,
)
# What the other ranks report when one has died.
_AFTERMATH = re.compile(
    r"connection (was )?(closed|reset|refused)|peer|broken pipe|communicator was aborted|remote process exited"
    r"|timed out waiting|socket|\bDist\w*Error",
    re.I,
)
_QUOTED = re.compile(r"(?<!\S)/\S+|'[^']*'|\"[^\"]*\"")  # paths and quoted words
_NUMBER = re.compile(r"0x[0-9a-f]+|\b[0-9a-f]{16}\b|\d+", re.I)  # run IDs too
_SRUN = re.compile(r"srun: error: ([\w.-]+): task")
_NODE = re.compile(r"[A-Za-z0-9][\w.-]*")


class NodeFaultError(RuntimeError):
    """Raised in place of a failed result: the node is at fault, and the run goes on elsewhere."""


class FaultKind(Enum):
    """What ended a start."""

    node = "node"  # its text points to the node
    setup = "setup"  # the job ended before it began a trial
    hang = "hang"  # no step for too long
    death = "death"  # a process died again without gaining a step
    error = "error"  # any other error


_SURE = (FaultKind.node, FaultKind.setup)  # one is enough, and a trial that ends well there later refutes nothing


@dataclass(frozen=True)
class Fault:
    """One start that ended by a fault."""

    trial: str  # run ID; before a trial begins, the job
    attempt: int  # of the trial's claim; 0 without a trial
    job: str
    nodes: list[str]  # where the fault may lie: one, unless the ranks on several nodes died together
    kind: FaultKind
    cause: str
    time: float  # seconds since 1970

    @property
    def line(self) -> str:
        """Return the fault as one line of text."""
        when = time.strftime("%F %H:%M", time.localtime(self.time))
        what = f"{self.trial}, attempt {self.attempt}, job {self.job}" if self.attempt else self.trial
        return f"{when}  {', '.join(self.nodes)}  {self.kind.value}  {what}: {self.cause}"


def points_to_node(text: str) -> bool:
    """Return whether a message is one of a device, a driver or a mount, and not of a program."""
    return bool(_OF_A_NODE.search(_QUOTED.sub("", text)))


def is_aftermath(text: str) -> bool:
    """Return whether a rank's error only says that another rank has ended."""
    return bool(_AFTERMATH.search(text)) and not points_to_node(text)


def this_node() -> str:
    """Return Slurm's name of the node that this process runs on."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename


def blamed_nodes(text: str, nodes: Sequence[str]) -> list[str]:
    """Return the node that srun names first in a log, or all of `nodes` if it names none of them."""
    named = [name for name in _SRUN.findall(text) if name in nodes]
    return named[:1] or list(nodes)


def _same(cause: str) -> str:
    """Return a cause, or the first line of a log's end, in a form that is equal for two cases of one fault."""
    return _NUMBER.sub("#", _QUOTED.sub("#", cause.partition(" | ")[0]))


def suspects(faults: Sequence[Fault]) -> dict[str, list[Fault]]:
    """Return the suspect nodes, the surest first, each with the faults that speak against it.

    A fault speaks against a node if its trial has not failed so elsewhere, except on other suspects.
    One is enough if its text points to the node, if the job's setup failed, or if processes died
    again and again. Otherwise it takes TRIALS_TO_SUSPECT different trials with an error that no
    other trial had elsewhere, or HANGS_TO_SUSPECT hangs.
    """
    found: dict[str, list[Fault]] = {}
    while True:
        left = [f for f in faults if not found.keys() & set(f.nodes)]
        evidence = {node: own for node in sorted({n for f in left for n in f.nodes}) if (own := _against(node, left))}
        if not evidence:
            return found
        node = max(evidence, key=lambda name: (len({f.trial for f in evidence[name]}), len(evidence[name])))
        found[node] = evidence[node]


def _against(node: str, faults: Sequence[Fault]) -> list[Fault]:
    """Return the faults that make `node` a suspect, or none."""
    elsewhere = {(f.trial, _same(f.cause)) for f in faults if node not in f.nodes}
    own = [f for f in faults if node in f.nodes and (f.trial, _same(f.cause)) not in elsewhere]
    sure = [f for f in own if f.kind in _SURE]
    deaths = [f for f in own if f.kind is FaultKind.death]
    hangs = [f for f in own if f.kind is FaultKind.hang]
    known = {_same(f.cause) for f in faults if node not in f.nodes}
    errors = [f for f in own if f.kind is FaultKind.error and _same(f.cause) not in known]
    counted = deaths + hangs * (len(hangs) >= HANGS_TO_SUSPECT) + errors * (len({f.trial for f in errors}) >= TRIALS_TO_SUSPECT)
    return [f for f in own if f in sure or f in counted]


def avoided(faults: Sequence[Fault], total: int, needed: int = 1) -> dict[str, list[Fault]]:
    """Return the suspects that new jobs avoid, the surest first.

    They are at most SHARE of `total` nodes, and leave the nodes `needed` for one job.
    """
    found = suspects(faults)
    order = sorted(found, key=lambda node: not any(f.kind in _SURE for f in found[node]))
    return {node: found[node] for node in order[: max(min(int(total * SHARE), total - needed), 0)]}


def is_charged(trial: str, faults: Sequence[Fault], avoid: Iterable[str]) -> bool:
    """Return whether the trial's faults are its own: it has none, or one on a node that is not avoided."""
    own, bad = [f for f in faults if f.trial == trial], set(avoid)
    return not own or any(not bad & set(f.nodes) for f in own) or len({tuple(sorted(f.nodes)) for f in own}) >= _TRIED


class Nodes:
    """The folder `nodes` of a sweep."""

    def __init__(self, folder: Path, total: int = 0, clock: Callable[[], float] = time.time) -> None:
        """Take the folder; `total` is the number of nodes to choose from, 0 if known.json has it."""
        self.folder, self._total, self._clock = folder, total, clock

    def record(self, fault: Fault, rank: int = 0) -> None:
        """Write a fault; of two by one rank of one attempt, the first stays.

        A disk that refuses it costs the evidence: the fault is then the trial's.
        """
        name = f"{fault.trial}-{fault.attempt}-{rank}" if fault.attempt else f"job-{fault.job}-{time.time_ns()}"
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            create_exclusive(self.folder / f"{name}.json", sealed_json({**asdict(fault), "kind": fault.kind.name}))

    def has(self, trial: str, attempt: int) -> bool:
        """Return whether a fault of that attempt is recorded."""
        return any(self.folder.glob(f"{trial}-{attempt}-*.json"))

    def hang_of(self, trial: str, attempt: int) -> str:
        """Return how long an attempt that was ended did no step, or "" if it did not hang."""
        return next((f.cause for f in self.live() if (f.trial, f.attempt, f.kind) == (trial, attempt, FaultKind.hang)), "")

    def read(self) -> tuple[list[Fault], list[ValueError]]:
        """Return all recorded faults, oldest first, and an error for each file that cannot be read."""
        found, damaged = [], []
        for path in sorted(self.folder.glob("*-*.json")):
            try:
                with reading(path):
                    found.append(build(Fault, read_json(path)))
            except ValueError as error:
                damaged.append(error)
        return sorted(found, key=lambda f: f.time), damaged

    def live(self) -> list[Fault]:
        """Return the faults that count now, without the nodes that have worked or were cleared since."""
        kept = []
        for fault in self.read()[0]:
            if self._clock() - fault.time < EXPIRY_HOURS * 3600:
                nodes = [n for n in fault.nodes if not self._is_over(n, fault)]
                kept += [Fault(**{**vars(fault), "nodes": nodes})] if nodes else []
        return kept

    def _is_over(self, node: str, fault: Fault) -> bool:
        marks = ["cleared"] if fault.kind in _SURE else ["cleared", "good"]
        return any(self._marked(node, mark) > fault.time for mark in marks)

    def _marked(self, node: str, mark: str) -> float:
        try:
            return (self.folder / f"{node}.{mark}").stat().st_mtime
        except OSError:
            return 0.0

    @property
    def total(self) -> int:
        """Return the number of nodes that the jobs may use, 0 if unknown."""
        return self._total or len(self._known()[0])

    def _known(self) -> tuple[list[str], int]:
        """Return the nodes that the jobs may use, and how many of them a job takes."""
        path = self.folder / "known.json"
        with contextlib.suppress(FileNotFoundError, ValueError), reading(path):
            values = read_json(path)
            return checked(list[str], values["nodes"], "nodes"), checked(int, values["needed"], "needed")
        return [], 1

    def know(self, nodes: Sequence[str], needed: int) -> None:
        """Record the nodes that the jobs may use, and how many of them a job takes."""
        if nodes:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(self.folder / "known.json", sealed_json({"nodes": list(nodes), "needed": needed}))

    def avoided(self) -> dict[str, list[Fault]]:
        """Return the nodes that new jobs avoid now, each with the faults that speak against it."""
        faults = self.live()
        return self._among(faults) if faults else {}

    def _among(self, faults: Sequence[Fault]) -> dict[str, list[Fault]]:
        return avoided(faults, self.total, 1 if self._total else self._known()[1])

    def is_charged(self, trial: str) -> bool:
        """Return whether the faults of a trial are its own, as far as is known now."""
        faults = self.live()
        return is_charged(trial, faults, self._among(faults))

    def works(self, nodes: Sequence[str], since: float) -> None:
        """Note that a trial that began at `since` (seconds since 1970) ended well on `nodes`."""
        with contextlib.suppress(OSError):
            self._works(nodes, since)

    def _works(self, nodes: Sequence[str], since: float) -> None:
        if any(self.folder.glob("*-*.json")):
            for node in nodes:
                self._mark(node, "good", since)

    def clear(self, node: str) -> None:
        """Forget what has happened on a node so far."""
        self._mark(node, "cleared", self._clock())

    def _mark(self, node: str, mark: str, when: float) -> None:
        if _NODE.fullmatch(node) and self._marked(node, mark) < when:
            path = self.folder / f"{node}.{mark}"
            path.unlink(missing_ok=True)  # it may be a hard link into the folder that this one is a copy of
            path.touch()
            os.utime(path, (when, when))

    @property
    def changed(self) -> int:
        """Return a number that changes when a fault is recorded or a trial reopened, 0 without any."""
        try:
            return self.folder.stat().st_mtime_ns
        except OSError:
            return 0

    def touch(self) -> None:
        """Let readers who keep the results of failed trials read them again."""
        os.utime(self.folder)

    def lines(self) -> list[str]:
        """Return a line for each avoided node and for each file that cannot be read."""
        live = self.live()
        kept_off, shown = self._among(live), []
        for node, faults in suspects(live).items():
            until = time.strftime("%F %H:%M", time.localtime(max(f.time for f in faults) + EXPIRY_HOURS * 3600))
            most = f"is suspect, but jobs still get it: they need {self._known()[1]} of {self.total} nodes, and {SHARE:.0%} may be avoided"
            what = f"is avoided until {until}" if node in kept_off else most
            starts = f"{len(faults)} start{'s' * (len(faults) > 1)} failed there and not elsewhere"
            shown.append(f"node {node} {what}: {starts}: {faults[-1].cause.partition(' | ')[0]}")
        return shown + [str(error) for error in self.read()[1]]


def off_bad_nodes(profile: ClusterProfile, nodes: Nodes) -> ClusterProfile:
    """Return the profile of a new job, which also excludes the nodes that the sweep avoids.

    Record first which nodes its jobs may use: at most a share of them is avoided.
    """
    own = str(profile.sbatch.get("exclude") or "")
    usable = slurm.nodes_of(profile.partition, str(profile.sbatch.get("nodelist") or ""))
    nodes.know(sorted(set(usable) - set(hosts(own))), profile.nodes_per_trial)
    exclude = ",".join([*([own] if own else []), *nodes.avoided()])
    return replace(profile, sbatch={**profile.sbatch, "exclude": exclude}) if exclude else profile
