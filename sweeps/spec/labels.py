"""Name configurations by what they set, so that different values look different.

A label is for people. What tells configurations apart is `Trial.configuration`.
"""

import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jobs.task import Task

_NUMBER = re.compile(r"[+-]?[\d.]+([eE][+-]?\d+)?")
_FEWEST = 4  # digits of a number that has more


def number(value: float, others: Iterable[float] = ()) -> str:
    """Return `value` in the fewest digits, at least four, by which it differs from `others`.

    A number that is short is written out. A long one is rounded by at most 0.5 % of itself, and of
    its distance from 1: 0.99999 is not 1.
    """
    apart = [other for other in others if other != value]
    for digits in range(_FEWEST, 18):
        text = f"{value:.{digits}g}"
        error = abs(float(text) - value)
        if error == 0:
            return text
        close = error <= 0.005 * min(abs(value), abs(1 - value)) and len(repr(value)) > _FEWEST + 6
        if close and all(f"{other:.{digits}g}" != text for other in apart):
            return text
    return repr(value)


def label(params: Mapping[str, Any], task: Task, beside: Sequence[Mapping[str, Any]] = ()) -> str:
    """Return a display name such as 'lr 0.0031, multi_block, depth 3', or 'unchanged'.

    Numbers differ in it from those of the configurations `beside` it.
    """
    names = _names(params)
    texts = {k: _texts(k, names[k], [v], [v, *(p[k] for p in beside if k in p)], task) for k, v in params.items()}
    return ", ".join(texts[key][repr(value)] for key, value in params.items()) or "unchanged"


def labels(configurations: Sequence[Mapping[str, Any]], task: Task) -> list[str]:
    """Return a display name for each configuration; different configurations have different ones."""
    names = _names({key for params in configurations for key in params})
    values = {key: list({repr(p[key]): p[key] for p in configurations if key in p}.values()) for key in names}
    texts = {key: _texts(key, names[key], found, found, task) for key, found in values.items()}
    made = [", ".join(texts[key][repr(value)] for key, value in params.items()) or "unchanged" for params in configurations]
    same = Counter(text for text, _ in {(text, repr(dict(params))) for text, params in zip(made, configurations, strict=True)})
    return [
        text if same[text] == 1 else ", ".join(f"{key} {_in_full(value)}" for key, value in params.items()) or text
        for text, params in zip(made, configurations, strict=True)
    ]


def _in_full(value: Any) -> str:
    """Return a value with nothing left out; a text that reads like another value is in quotes."""
    other = isinstance(value, str) and (_NUMBER.fullmatch(value) or value in ("True", "False"))
    return repr(value) if other else str(value)


def _names(keys: Iterable[str]) -> dict[str, str]:
    """Return key -> the fewest of its last parts that no other key ends in."""
    keys = list(keys)
    parts = 1
    found = {key: key.rpartition(".")[2] for key in keys}
    while twice := {key for key, name in found.items() if list(found.values()).count(name) > 1 and name != key}:
        parts += 1
        found |= {key: ".".join(key.split(".")[-parts:]) for key in twice}
    return found


def _texts(key: str, name: str, values: Sequence[Any], others: Sequence[Any], task: Task) -> dict[str, str]:
    """Return what is written for each value of a key, by its repr, so that it differs from what is for the others."""
    words = {repr(v): task.word(key, v) for v in values if isinstance(v, str)}
    repeated = Counter(words.values())
    ordered = sorted({float(other) for other in others if type(other) in (int, float)})
    found = {}
    for value in values:
        if isinstance(value, str):
            word = words[repr(value)]
            found[repr(value)] = word if repeated[word] == 1 and not _NUMBER.fullmatch(word) else f"{name} {value}"
        else:
            found[repr(value)] = f"{name} {number(value, _nearest(value, ordered)) if isinstance(value, float) else value}"
    return found


def _nearest(value: float, ordered: Sequence[float]) -> list[float]:
    """Return the next smaller and the next larger number: as rounding keeps the order, no other need be looked at."""
    below, above = bisect_left(ordered, value), bisect_right(ordered, value)
    return [*ordered[max(below - 1, 0) : below], *ordered[above : above + 1]]
