"""Build values of the declared types from JSON or YAML, and refuse what is of another type."""

import collections.abc
import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from enum import Enum
from typing import Any, TypeVar

T = TypeVar("T")
_MOST_DIGITS = 2**63  # no count of ours is larger, and a float must hold it


def _name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")


def _refused(hint: Any, value: Any, where: str) -> TypeError:
    if isinstance(hint, type) and issubclass(hint, Enum):
        return TypeError(f"{where} must be one of {', '.join(hint.__members__)}; got {str(value)[:60]!r}")
    return TypeError(f"{where} must be of type {_name(hint)}; got {str(value)[:60]!r}, a {type(value).__name__}")


@functools.lru_cache(maxsize=1024)
def _taken_apart(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return what a type is of, and its parameters; a folder of 1,000 runs asks for 200,000 of them."""
    return typing.get_origin(hint) or hint, typing.get_args(hint)


def checked(hint: Any, value: Any, where: str) -> Any:
    """Return `value` as type `hint`; raise TypeError, which names `where`, if it is of another type.

    A whole number is also a float. Enums are written by name, dataclasses as objects.
    """
    kind, parts = _taken_apart(hint)
    if kind is Any:
        return value
    if kind in (typing.Union, types.UnionType):
        return _checked_union(hint, value, where)
    if kind in (list, tuple, collections.abc.Sequence):
        return _checked_list(hint, value, where)
    if kind in (dict, collections.abc.Mapping):
        if not isinstance(value, dict):
            raise _refused(hint, value, where)
        key, inner = parts or (Any, Any)
        return {checked(key, k, f"a key of {where}"): checked(inner, v, f"{where}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return build(kind, value, f"{where}.")
    if kind in (bool, str, int) and (type(value) is not kind or (kind is int and abs(value) >= _MOST_DIGITS)):
        raise _refused(hint, value, where)
    if kind is float:
        if type(value) not in (int, float) or (type(value) is int and abs(value) >= _MOST_DIGITS):
            raise _refused(hint, value, where)
        return float(value)
    if kind in (None, type(None)):
        if value is not None:
            raise _refused(hint, value, where)
        return None
    if issubclass(kind, Enum):
        if not isinstance(value, str) or value not in kind.__members__:
            raise _refused(hint, value, where)
        return kind[value]
    return value if kind in (bool, str, int) else kind(value)


def _checked_union(hint: Any, value: Any, where: str) -> Any:
    options = [o for o in typing.get_args(hint) if o is not type(None)]
    if value is None and len(options) < len(typing.get_args(hint)):
        return None
    if len(options) == 1:
        return checked(options[0], value, where)
    # The type that the value has already: 1 must not become 1.0.
    for option in sorted(options, key=lambda o: o is not type(value)):
        try:
            return checked(option, value, where)
        except TypeError:
            continue
    raise _refused(hint, value, where)


def _checked_list(hint: Any, value: Any, where: str) -> Any:
    """Return a list for a list, a tuple for a tuple or a sequence."""
    kind, parts = typing.get_origin(hint) or hint, typing.get_args(hint) or (Any, ...)
    if not isinstance(value, (list, tuple)):
        raise _refused(hint, value, where)
    of_each = parts if kind is tuple and parts[1:] != (...,) else (parts[0],) * len(value)
    if len(of_each) != len(value):
        raise _refused(hint, value, where)
    made = [checked(part, v, f"{where}[{i}]") for i, (part, v) in enumerate(zip(of_each, value, strict=True))]
    return made if kind is list else tuple(made)


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    """Return the types of the fields that a dataclass is built from, except private ones."""
    hints = typing.get_type_hints(kind)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind) if f.init and not f.name.startswith("_")}


def build(kind: type[T], values: Any, where: str = "", **given: Any) -> T:
    """Build a dataclass from JSON values; raise TypeError if a key or a type is wrong or missing.

    `given` are fields that are no JSON values, and are taken as they are.
    """
    if not isinstance(values, dict):
        raise TypeError(f"{where.removesuffix('.') or kind.__name__} must be an object; got a {type(values).__name__}")
    hints = _hints(kind)  # type: ignore[arg-type]  # a class is hashable
    for key in values:
        if key not in hints or key in given:
            raise TypeError(f"{where}{key} must be a key of {kind.__name__}; got one that it does not have")
    fields: Mapping[str, Any] = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in hints.keys() - values.keys() - given.keys():
        if fields[key].default is dataclasses.MISSING and fields[key].default_factory is dataclasses.MISSING:
            raise TypeError(f"{where}{key} must be given; got {kind.__name__} without it")
    return kind(**{key: checked(hints[key], value, f"{where}{key}") for key, value in values.items()}, **given)
