"""What a plain task's configuration must be, and the keys that identify its program and data."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from cnnjepa.run.identity import FIDELITY

VERSION, FINGERPRINT = "task_version", "data_fingerprint"  # keys that a task's `version` and `data` add


def require_several(**lists: Sequence[str]) -> None:
    """Raise ValueError at a text that stands where a list of texts is needed."""
    for name, value in lists.items():
        if isinstance(value, str):
            raise ValueError(f"{name} must be a list of texts; got the text {value!r}: write [{value!r}]")


def with_identity(kind: Any, version: str = "", has_data: bool = False) -> type:
    """Return dataclass `kind` with the keys of what identifies its program and data; raise ValueError if it is no configuration."""
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        raise ValueError(f"Config must be a dataclass; got {kind!r}")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for f in fields.values():
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ValueError(f"Config must have a default for each field; got {kind.__name__}.{f.name} without one")
    if "seed" not in fields:
        raise ValueError(f"Config must have a field seed; got {kind.__name__} without it")
    if taken := {"task", VERSION, FINGERPRINT} & fields.keys():
        raise ValueError(f"Config must leave {min(taken)} to the launcher; got {kind.__name__}.{min(taken)}")
    more: list[tuple[str, type, Any]] = []
    if not fields.keys() & set(FIDELITY):
        more.append((FIDELITY[0], int, dataclasses.field(default=1)))
    if version:
        more.append((VERSION, str, dataclasses.field(default=version)))
    if has_data:
        more.append((FINGERPRINT, str, dataclasses.field(default="")))
    return dataclasses.make_dataclass(kind.__name__, more, bases=(kind,), namespace={"__doc__": kind.__doc__}) if more else kind
