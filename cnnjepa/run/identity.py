"""What makes two runs the same: a configuration as plain values, back again, and as the signature that names its run."""

import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Callable
from enum import Enum
from typing import Any, TypeVar

from cnnjepa.config import DatasetName, MethodConfig, TrainConfig, method_module


def to_dict(config: Any, neutral: bool = True) -> dict[str, Any]:
    """`config` as nested dicts of JSON values, enums by name.

    Where `neutral` is False, without the neutral fields, and without those that came later and hold their default.
    """
    out: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if not neutral and (f.metadata.get("neutral") or (f.metadata.get("added") and value == f.default)):
            continue
        if dataclasses.is_dataclass(value):
            value = to_dict(value, neutral)
        out[f.name] = value.name if isinstance(value, Enum) else value
    return out


T = TypeVar("T")


def _build(kind: Callable[..., T], values: dict[str, Any], path: str) -> T:
    assert isinstance(kind, type)
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ValueError(f"{path}{unknown[0]} must be a key of {kind.__name__}; the file is of another version of this project")
    built: dict[str, Any] = {}
    for name, value in values.items():
        hint = hints[name]
        if isinstance(hint, types.GenericAlias):
            built[name] = list(value)
        elif issubclass(hint, MethodConfig):
            built[name] = _build(method_module(value["name"]).Config, value, f"{path}{name}.")
        elif dataclasses.is_dataclass(hint):
            built[name] = _build(typing.cast(Callable[..., Any], hint), value, f"{path}{name}.")
        else:
            built[name] = hint[value] if issubclass(hint, Enum) else hint(value)
    return typing.cast(T, kind(**built))


def from_dict(values: dict[str, Any]) -> TrainConfig:
    """The TrainConfig that `to_dict` wrote; raises ValueError at a key that this version does not know, TypeError for no dictionary."""
    if not isinstance(values, dict):
        raise TypeError(f"a configuration is a dictionary and not a {type(values).__name__}")
    return _build(TrainConfig, values, "")


def identity(config: TrainConfig) -> dict[str, Any]:
    """What makes `config` another run than the next: all but the neutral keys. An image folder has no name but where it lies."""
    values = to_dict(config, neutral=False)
    if config.data.name is DatasetName.imagefolder:
        values["data"]["root"] = config.data.root
    return values


def signature(config: TrainConfig) -> str:
    """16 hex digits, the same for two configurations that are the same run."""
    text = json.dumps(identity(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(old: dict[str, Any], new: dict[str, Any], path: str = "") -> list[str]:
    """Lines 'key: old -> new' for each leaf in which two `to_dict` results differ."""
    lines: list[str] = []
    for key in sorted(set(old) | set(new)):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{path}{key}.")
        elif a != b:
            lines.append(f"{path}{key}: {a} -> {b}")
    return lines
