"""Read and write a run folder, the source of truth about a run.

It contains config.yaml, metrics.jsonl, checkpoints/, tensorboard/, log/ and result.json. A resumed
run drops the metrics past its checkpoint and writes them again, identical except for TIMING_KEYS.
In a sweep each attempt writes files of its own: see cnnjepa/run/attempts.py.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from cnnjepa.run import checkpoint
from cnnjepa.run.attempts import attempts_with, lost, newest, numbered, publish
from cnnjepa.run.files import SEAL, DamagedError, Lines, create_exclusive, link_or_copy, read_json, reading, sealed_json, write_atomic
from cnnjepa.run.identity import differences, from_dict, identity, old_keys, signature, to_dict
from cnnjepa.run.records import read_metrics, read_probes, record_of
from cnnjepa.run.typed import build

_TAIL_BYTES = 4096  # more than the last record of a metrics file takes

# These depend on the machine and the moment, and are ignored when two runs are compared.
TIMING_KEYS = frozenset(
    {
        "images_per_second",
        "seconds",
        "training_seconds",
        "evaluation_hours",
        "device_hours",
        "peak_memory_mb",
        "resumes",
        "claim",
        "energy_kwh",
        "joules",
        "pretraining_hours",
        "gpu_utilisation",
        "data_wait_seconds",
        "data_wait_share",
        "records",  # in a checkpoint: a digest of the above
        SEAL,
    }
)


_LARGE_YAML = 16_384  # bytes
_FILES, _FOLDERS = ("config.yaml", "metrics.jsonl", "result.json", "skipped.json"), ("checkpoints", "claim", "log", "scores")


class RunStatus(Enum):
    """How a run ended. A pruned run was stopped early and can be resumed."""

    completed = "completed"
    pruned = "pruned"
    failed = "failed"


@dataclass
class RunResult:
    """Outcome of a run. A value that could not be computed is in `missing`, with its cause."""

    status: RunStatus
    cause: str = ""  # of a failure, or of the pruning, one line
    metrics: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)  # probe -> cause
    images: dict[str, int] = field(default_factory=dict)  # score -> the images that it rests on
    # name of a reference, such as chance level -> score -> its value
    references: dict[str, dict[str, float]] = field(default_factory=dict)
    probes: dict[str, dict[str, float]] = field(default_factory=dict)  # epoch -> metrics, of the probes during training
    step: int = 0
    seconds: float = 0.0  # spent training and probing, over all resumes
    device_hours: float = 0.0  # GPU-hours on CUDA, core-hours (threads x ranks) on CPU
    images_per_second: float = 0.0
    peak_memory_mb: float = 0.0
    parameters: int = 0  # trainable
    resumes: int = 0
    claim: int = 0  # attempt of the claim under which it was written
    skipped_images: int = 0  # left out by data.on_bad_image=skip, as listed in skipped.json
    energy_kwh: float | None = None  # of all GPUs, over all resumes; None if they do not report it
    gpu_utilisation: float | None = None  # of the main rank's GPU at the logged steps, in [0, 1]; None if not reported
    data_wait_share: float | None = None  # of the time in the training loop; None if no image is loaded
    evaluation_hours: dict[str, float] = field(default_factory=dict)  # evaluation -> its device-hours, which are not in device_hours

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {**asdict(self), "status": self.status.name}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "RunResult":
        """Build the result from the values of `to_dict`; raise TypeError if a type is wrong."""
        return build(RunResult, values)


class HopelessError(RuntimeError):
    """Raised on every rank when the run itself is at fault; a retry would end the same way."""


class EvaluationStopped(Exception):
    """Raised on every rank when an evaluation was asked to stop, and has kept what it has done."""


class RunError(RuntimeError):
    """Raised from the error that ended training; holds the progress and the time spent."""

    def __init__(self, step: int, seconds: float, device_hours: float) -> None:
        super().__init__(f"training ended by an error at step {step}")
        self.step, self.seconds, self.device_hours = step, seconds, device_hours

    def __str__(self) -> str:
        """Return one line with the cause, which is the last one of a traceback too."""
        return super().__str__() + (f": {line_of(self.__cause__)}" if self.__cause__ else "")


def line_of(error: BaseException) -> str:
    """Return type and message of an error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _yaml(path: Path) -> Any:
    """Return the content of a YAML file, by libyaml's parser where it is sure not to crash.

    It takes a seventh of the time, and a sweep has thousands of these files.
    """
    data = path.read_bytes()
    fast = len(data) < _LARGE_YAML  # a hundred thousand brackets would overflow its stack
    return yaml.load(data, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader) if fast else yaml.SafeLoader)  # noqa: S506


def never() -> bool:
    """Never ask the run to stop."""
    return False


def no_judge(epoch: int, metrics: dict[str, float]) -> str:
    """Let every run reach its end."""
    return ""


@dataclass(frozen=True)
class EarlyWarning:
    """A sign of trouble: what was seen at which epoch, its threshold, and what to do."""

    name: str
    epoch: float
    value: float
    threshold: float
    seen: str
    advice: str

    @property
    def line(self) -> str:
        """Return the whole warning as one line of text."""
        return f"{self.name}: {self.seen}; {self.advice}"

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {**asdict(self), "line": self.line}


class RunFolder:
    """A run's folder; each method reads or writes one of its files."""

    def __init__(self, path: Path, attempt: int = 0) -> None:
        """Take the path, and the attempt that writes; nothing is created until `prepare`."""
        self.path, self.attempt = path, attempt
        self.checkpoints = path / "checkpoints"
        self.tensorboard = path / "tensorboard"
        self.logs = path / "log"
        self._config = path / "config.yaml"
        self._metrics = path / "metrics.jsonl"
        self._result = path / "result.json"
        # What the runs of a sweep share: its folder.
        self.shared = path.parent.parent if path.parent.name == "trials" else None
        self.should_stop: Callable[[], bool] = never  # of a job that scores the run later
        self._writer: Lines | None = None
        self._recorded, self._recorded_bytes = hashlib.sha256(), 0  # of the records that were handed to the writer

    def prepare(self, config: Any) -> None:
        """Create the folder; raise ValueError if it holds another configuration or an older version's."""
        is_begun = self.is_begun(config)
        self.logs.mkdir(parents=True, exist_ok=True)
        if not is_begun:
            write_atomic(self._config, yaml.safe_dump(to_dict(config), sort_keys=False))

    def is_begun(self, config: Any) -> bool:
        """Return whether the folder holds this configuration; raise ValueError if it holds another, or an older version's."""
        if self._config.exists():
            held = self.config()
            if old := old_keys(_yaml(self._config)):
                key, new = next(iter(old.items()))
                raise ValueError(f"run folder must be empty or of this version; got {self.path}, where {key} is not yet called {new}")
            if signature(held) != signature(config):
                first = differences(identity(held), identity(config))[0]
                raise ValueError(f"run folder must be empty or hold the same configuration; got {self.path}, where {first}")
        return self._config.exists()

    def config(self) -> Any:
        """Return the configuration of the run; raise ValueError if the folder holds none."""
        if not self._config.exists():
            raise ValueError(f"a run folder must hold config.yaml; got {self.path}")
        try:
            return from_dict(_yaml(self._config))
        except (yaml.YAMLError, TypeError, KeyError, AttributeError, ValueError, OSError, RecursionError) as error:
            raise DamagedError(self._config, f"{type(error).__name__} {error}", "be a file that a run wrote") from error

    def check(self, values: dict[str, Any] | None) -> None:
        """Raise DamagedError if the folder cannot be that of a run of these values, or None for any.

        In a sweep, no link in it may lead out of the sweep's folder: what is written, renamed or
        deleted here would be elsewhere.
        """
        entries = self._entries()
        if self.shared is not None:
            root = self.shared.resolve()
            for path in [self.path, *(Path(entry) for entry in entries if entry.is_symlink())]:
                if not path.resolve().is_relative_to(root):
                    raise DamagedError(path, f"it leads to {path.resolve()}", f"stay within {root}", "replace the link by what it leads to")
        for entry in entries:
            if entry.name in _FILES + _FOLDERS and not (entry.is_file() if entry.name in _FILES else entry.is_dir()):
                kind = "file" if entry.name in _FILES else "folder"
                raise DamagedError(Path(entry.path), f"it is no {kind}", f"be a {kind}", "move it away and type the command again")
        if values is not None and self._config.exists() and not self._is_of(values):
            raise DamagedError(self._config, "it holds another configuration")

    def _is_of(self, values: dict[str, Any]) -> bool:
        with contextlib.suppress(yaml.YAMLError, ValueError, OSError, RecursionError):
            if _yaml(self._config) == values:
                return True  # without building a configuration: its method would import torch
        held = self.config()
        try:
            return signature(held) == signature(from_dict(values))
        except (ValueError, TypeError, KeyError, AttributeError):
            return True  # only other code can build it, and must run it

    def _entries(self) -> list["os.DirEntry[str]"]:
        with reading(self.path), contextlib.suppress(FileNotFoundError), os.scandir(self.path) as found:
            return list(found)
        return []

    def result(self) -> RunResult | None:
        """Return how the run ended, or None if it has not.

        A result written under a claim that another one has followed is not the run's.
        """
        result = self._standing()
        return None if result is not None and lost(self.path, result.claim) else result

    def _standing(self) -> RunResult | None:
        """Return what result.json says, whichever claim it is of."""
        if not self._result.exists():
            return None
        with reading(self._result):
            try:
                return RunResult.from_dict(read_json(self._result))
            except FileNotFoundError:  # a command has set it aside meanwhile
                return None

    def ended_at(self) -> float:
        """Return when the result was written, in seconds since the Unix epoch; 0.0 without one."""
        try:
            return self._result.stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def write_result(self, result: RunResult) -> bool:
        """Record how the run ended; return False if this or a later claim has a result.

        If a later claim exists, the result becomes result.attempt-N.json, which is not the run's.
        """
        text = sealed_json(result.to_dict())
        if lost(self.path, result.claim):
            write_atomic(self.path / f"result.attempt-{result.claim}.json", text)
            return False
        if create_exclusive(self._result, text):
            return True
        standing = self._standing()
        if standing is not None and standing.claim >= result.claim:
            return False
        write_atomic(self._result, text)
        return True

    def amend_result(self, result: RunResult) -> None:
        """Replace the result of a run that has ended by one with more scores.

        It keeps the time of the run's end. A result of another status is kept beside it.
        """
        ended, standing = self._result.stat(), self.result()
        if standing is not None and standing.status is not result.status:
            link_or_copy(self._result, self._aside(standing.status))
        write_atomic(self._result, sealed_json(result.to_dict()))
        os.utime(self._result, ns=(ended.st_atime_ns, ended.st_mtime_ns))

    def set_aside(self, status: RunStatus) -> None:
        """Rename a result of `status` to result.<status>-N.json; the run can then resume."""
        result = self.result()
        if result is None or result.status is not status:
            return
        with contextlib.suppress(FileNotFoundError):  # another command was faster
            os.rename(self._result, self._aside(status))

    def _aside(self, status: RunStatus) -> Path:
        number = len(list(self.path.glob(f"result.{status.name}-*.json"))) + 1
        return self.path / f"result.{status.name}-{number}.json"

    @property
    def records(self) -> Path:
        """Return the file of this attempt's records; for a reader, the newest attempt's."""
        own = numbered(self._metrics, self.attempt)
        return own if own.exists() else newest(self._metrics)

    def probes(self) -> dict[str, dict[str, float]]:
        """Return epoch -> metrics of the probes so far."""
        return read_probes(self.records)[0]

    def metrics(self) -> list[dict[str, Any]]:
        """Return all records so far."""
        return read_metrics(self.records)

    def open_metrics(self, step: int, source: int | None = None) -> None:
        """Continue the records of attempt `source` up to `step`, in a new file of this attempt.

        Without `source`, continue those of the newest attempt so far that reach `step`.
        """
        own, source = numbered(self._metrics, self.attempt), self._reaching(step) if source is None else source
        kept = b""
        for line in self._lines(source):
            if (record := record_of(line)) and record["step"] <= step and record["kind"] != "final":
                kept += line + b"\n"
        write_atomic(own, kept)
        self._recorded, self._recorded_bytes = hashlib.sha256(kept), len(kept)
        self._writer = Lines(own)
        publish(self._metrics, self.attempt, self.path)
        self._drop_earlier()

    def _lines(self, attempt: int) -> list[bytes]:
        """Return the whole lines that an attempt has recorded."""
        path = numbered(self._metrics, attempt)
        return path.read_bytes().split(b"\n")[:-1] if path.exists() else []

    def _reaching(self, step: int) -> int:
        """Return the newest attempt, not after this one, with a record of `step` or later."""
        known = [number for number in attempts_with(self._metrics) if number <= self.attempt]
        for number in known:
            last = read_metrics(numbered(self._metrics, number), _TAIL_BYTES)
            if max((r["step"] for r in last), default=0) >= step:
                return number
        return known[0] if known and not self._metrics.exists() else 0

    def _drop_earlier(self) -> None:
        """Remove the records of attempts before the last one that no checkpoint needs any more."""
        needed = {found.attempt for found in checkpoint.find(self.checkpoints)}
        for number in attempts_with(self._metrics):
            if number < self.attempt - 1 and number not in needed and not lost(self.path, self.attempt):
                numbered(self._metrics, number).unlink(missing_ok=True)

    def record(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Append a record, as soon as the disk accepts it; non-finite values become null."""
        assert self._writer is not None
        finite = {k: v if not isinstance(v, float) or abs(v) < float("inf") else None for k, v in values.items()}
        line = json.dumps({"kind": kind, "step": step, **finite}, allow_nan=False)
        self._writer.add(line)
        self._recorded.update(line.encode() + b"\n")
        self._recorded_bytes += len(line.encode()) + 1

    def mark(self) -> dict[str, Any]:
        """Return what a checkpoint keeps about the records that lead to it: see `holds`."""
        return {"bytes": self._recorded_bytes, "sha256": self._recorded.hexdigest()}

    def holds(self, mark: dict[str, Any], attempt: int) -> bool:
        """Return whether the records of `attempt` begin with those that `mark` was made of."""
        path = numbered(self._metrics, attempt)
        data = path.read_bytes()[: mark["bytes"]] if path.exists() else b""
        return len(data) == mark["bytes"] and hashlib.sha256(data).hexdigest() == mark["sha256"]

    def sync(self) -> None:
        """Make the records durable, before a checkpoint that follows them, or raise OSError."""
        if self._writer is not None:
            self._writer.sync()
            publish(self._metrics, self.attempt, self.path)  # an attempt that woke up may have renamed its own

    def close(self) -> None:
        """Close the file; a power cut may lose what was recorded after the last `sync`."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
