"""Scores that are computed after a run has ended, from its final checkpoint.

`scores/<probe>-<digest>.json` in the run folder holds those of one probe under one choice of
settings. What a completed run lacks under its own settings, or did not ask for, joins its result
too. A value that is there is never replaced.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from cnnjepa.run.files import read_json, reading, sealed_json, write_atomic
from cnnjepa.run.folder import RunFolder, RunResult, RunStatus
from cnnjepa.run.typed import checked

log = logging.getLogger(__name__)
V = TypeVar("V")
_LATER = {"metrics": dict[str, float], "images": dict[str, int], "references": dict[str, dict[str, float]], "computed": list[Any]}


@dataclass(frozen=True)
class Probed:
    """Describe one probe of a run on one data set, and how it is made.

    `settings` are the probe's and `source` is the set's, as JSON values: all that its scores depend
    on beside the weights.
    """

    name: str
    data: str  # "" is the run's own set
    settings: dict[str, Any]
    source: dict[str, Any]
    is_own: bool  # under the run's own settings: the scores may join its result
    is_asked: bool  # and on a set that the run itself asks for, or its own: those of its result are they

    @property
    def label(self) -> str:
        """Return how `missing` calls it; its metrics begin with that."""
        return f"{self.name}.{self.data}" if self.data else self.name

    @property
    def file(self) -> str:
        """Return the name of its file, the same for scores that may stand in for each other."""
        text = json.dumps([self.settings, self.source], sort_keys=True)
        return f"{self.label}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"

    def mine(self, values: dict[str, V]) -> dict[str, V]:
        """Return those of `values`, by metric, that are its own; those on other sets have a part more."""
        start = f"{self.label}."
        return {k: v for k, v in values.items() if k.startswith(start) and (self.data or "." not in k.removeprefix(start))}


@dataclass
class Scores:
    """Hold what probes found, the cause of each that has no value, and how it was computed."""

    metrics: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    images: dict[str, int] = field(default_factory=dict)  # score -> the images that it rests on
    references: dict[str, dict[str, float]] = field(default_factory=dict)  # name -> score -> its value
    hours: dict[str, float] = field(default_factory=dict)  # evaluation -> its device-hours
    failure: str = ""  # why the run has failed after all, such as collapsed features
    about: dict[str, Any] = field(default_factory=dict)  # JSON values


def _later(folder: RunFolder, part: Probed) -> dict[str, Any]:
    """Return the values of the file of scores that were recorded after the run's end."""
    path = folder.path / "scores" / part.file
    if not path.exists():
        return {"metrics": {}, "images": {}, "references": {}, "computed": []}
    with reading(path):
        values = read_json(path)
        return {key: checked(kind, values[key], key) for key, kind in _LATER.items()}


def is_lacking(folder: RunFolder, result: RunResult, part: Probed) -> bool:
    """Return whether the probe has no value."""
    return not (part.is_asked and part.mine(result.metrics)) and not _later(folder, part)["metrics"]


def merged(new: Mapping[str, dict[str, float]], old: Mapping[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return both scores by name of the reference; what is old is not replaced."""
    return {name: {**new.get(name, {}), **old.get(name, {})} for name in {**old, **new}}


def record(folder: RunFolder, part: Probed, found: Scores) -> Path:
    """Write down what a probe found, then add to the run's result what it may hold and lacks.

    Returns the file of the scores. The result keeps its time.
    """
    path, known = folder.path / "scores" / part.file, _later(folder, part)
    cause = found.missing.get(part.label, "")
    about = {"probe": part.name, "data": part.data, "settings": part.settings, "source": part.source}
    metrics, images = part.mine(found.metrics) | known["metrics"], part.mine(found.images) | known["images"]
    compared = merged({name: part.mine(scores) for name, scores in found.references.items()}, known["references"])
    values = {**about, "metrics": metrics, "images": images, "references": compared}
    path.parent.mkdir(exist_ok=True)
    write_atomic(path, sealed_json({**values, "computed": [*known["computed"], {**found.about, "missing": cause}]}))
    result = folder.result()
    if result is None or result.status is not RunStatus.completed or not part.is_own:
        return path
    if found.failure:
        folder.amend_result(replace(result, status=RunStatus.failed, cause=found.failure, metrics={}, missing={}, images={}, references={}))
        return path
    missing = {k: cause if cause and k == part.label else v for k, v in result.missing.items() if k != part.label or not metrics}
    there = {"metrics": metrics | result.metrics, "missing": missing, "images": images | result.images}
    took = {k: v for k, v in found.hours.items() if k == part.label}
    there["evaluation_hours"] = took | result.evaluation_hours
    amended = replace(result, **there, references=merged(compared, result.references))
    if amended != result:
        folder.amend_result(amended)
    return path


@contextlib.contextmanager
def locked(folder: RunFolder, wait: bool) -> Iterator[bool]:
    """Keep other commands from scoring the run within the block; yield whether that is so.

    With `wait`, wait for the command that scores it now. The lock ends with its process. Where the
    file system has no locks, a run may be scored twice, with the same scores.
    """
    path = folder.path / "scores" / "lock"
    path.parent.mkdir(exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    held = True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        held = False
    except OSError as error:
        log.warning("%s cannot be locked: %s", path, error.strerror)
    try:
        yield held
    finally:
        os.close(descriptor)
