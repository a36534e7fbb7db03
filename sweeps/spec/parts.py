"""Check the types of what a sweep's file gives, part by part, before anything reads it."""

import collections.abc
import dataclasses
import math
import types
import typing
from typing import Any

# Options of dimensions and what configurations set have rules of their own: sweeps/spec/check.py.
_OWN_RULES = ("command", "SweepSpec.defaults", "Configuration.overrides", "Dimension")
_WORDS: dict[type, str] = {str: "a text", int: "a whole number", float: "a finite number", bool: "True or False"}


def check_parts(part: Any, where: str = "") -> None:
    """Raise ValueError, which names the field, if one of a dataclass or of those in it has another type."""
    hints = typing.get_type_hints(type(part))
    for name in [f.name for f in dataclasses.fields(part)]:
        if name not in _OWN_RULES and f"{type(part).__name__}.{name}" not in _OWN_RULES:
            _check(hints[name], getattr(part, name), f"{where}{name}")
        elif typing.get_origin(hints[name]) is collections.abc.Mapping:
            _check(collections.abc.Mapping, getattr(part, name), f"{where}{name}")


def _check(hint: Any, value: Any, where: str) -> None:
    kind, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        fitting = [h for h in inner if isinstance(value, _class_of(h))]
        if not fitting:
            _refuse(hint, value, where)
        _check(fitting[0], value, where)
    elif kind is collections.abc.Sequence:
        if isinstance(value, str) and inner == (str,):
            raise ValueError(f"{where} must be a tuple of texts; got the text {value!r}: write ({value!r},)")
        if not isinstance(value, (list, tuple)):
            _refuse(hint, value, where)
        for i, each in enumerate(value):
            _check(inner[0], each, f"{where}[{i}]")
    elif kind is collections.abc.Mapping:
        if not isinstance(value, collections.abc.Mapping):
            _refuse(hint, value, where)
        for key, each in value.items() if inner else ():
            _check(inner[0], key, f"a key of {where}")
            _check(inner[1], each, f"{where}[{key!r}]")
    elif kind is float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            _refuse(hint, value, where)
    elif not isinstance(value, kind):
        _refuse(hint, value, where)
    elif dataclasses.is_dataclass(value) and type(value).__name__ not in _OWN_RULES:
        check_parts(value, f"{where}.")


def _class_of(hint: Any) -> Any:
    kind = typing.get_origin(hint) or hint
    return (int, float) if kind is float else (str, list, tuple) if kind is collections.abc.Sequence else kind


def _said(hint: Any) -> str:
    """Return what a value must be, in words."""
    kind, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return " or ".join(_said(h) for h in inner if h is not type(None))
    if kind is collections.abc.Sequence:
        return f"a list, each of which is {_said(inner[0])}"
    if kind is collections.abc.Mapping:
        return f"a dict of {_WORDS[inner[1]].partition(' ')[2]}s" if inner and inner[1] in _WORDS else "a dict"
    return _WORDS.get(kind, f"a {kind.__name__}")


def _refuse(hint: Any, value: Any, where: str) -> typing.NoReturn:
    got = f"{value!r}"
    raise ValueError(f"{where} must be {_said(hint)}; got {got[:60]}{'...' if len(got) > 60 else ''}, a {type(value).__name__}")
