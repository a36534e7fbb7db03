"""Compare two sweeps: their configurations side by side, and what differs in base configuration and code."""

import dataclasses
import json
import math
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cnnjepa.run.identity import config_class, old_keys, task_name
from jobs.task import task_of
from sweeps.report.aggregate import Spread, Summary, summaries
from sweeps.report.code_of import code_lines
from sweeps.report.significance import ALPHA, Comparison, compare
from sweeps.report.winner import pairs
from sweeps.state.view import View

Leaves = dict[str, Any]  # full key -> value


@dataclass(frozen=True)
class Side:
    """A configuration in one of the sweeps."""

    summary: Summary
    values: Leaves  # without the seed and what cannot change a result


@dataclass(frozen=True)
class Pair:
    """A configuration that both sweeps have."""

    sets: Leaves  # what tells it from the others of its sweep
    first: Side
    second: Side
    comparison: Comparison | None  # of the second with the first, as if there were no others; None without a score of each
    p: float | None = None  # judged among all pairs

    @property
    def better(self) -> int:
        """Return 1 or 2 for the sweep with the higher mean, 0 for neither, if the difference is statistically significant."""
        if self.p is None or self.p > ALPHA or self.comparison is None:
            return 0
        return 1 if self.comparison.difference < 0 else 2


@dataclass(frozen=True)
class Compared:
    """Two sweeps by one metric."""

    metric: str
    sign: float  # -1 if lower is better
    pairs: list[Pair]
    only: tuple[list[Side], list[Side]]  # configurations that the other sweep lacks
    varied: list[str]  # keys by which configurations are matched
    base: list[tuple[str, Any, Any]]  # key, and its value in all configurations of each sweep
    code: list[str]


def compared(first: View, second: View) -> Compared:
    """Compare two sweeps by the objective of the first; raise ValueError if the second has no such metric."""
    metric, sides = first.sweep.objective, (_sides(first), _sides(second))
    if not any(metric in side.summary.values for side in sides[1]):
        rule = f"have the metric {metric}, by which {first.sweep.path} is ranked"
        raise ValueError(f"{second.sweep.path} must {rule}; got one ranked by {second.sweep.objective}")
    of_each = [_by_key(found) for found in sides]
    varied = sorted(key for key in of_each[0].keys() | of_each[1].keys() if any(len(of.get(key, [])) > 1 for of in of_each))
    others = {_place(side, varied): side for side in sides[1]}
    matched = [(side, others.pop(place)) for side in sides[0] if (place := _place(side, varied)) in others]
    taken = {id(side) for pair in matched for side in pair}
    only = tuple([side for side in found if id(side) not in taken] for found in sides)
    base = []
    for key in sorted(of_each[0].keys() | of_each[1].keys()):
        now = [of.get(key, [None]) for of in of_each]
        if key not in varied and now[0] != now[1]:
            base.append((key, now[0][0], now[1][0]))
    made = _tested([_pair(metric, varied, *pair) for pair in matched], metric)
    sign = first.sweep.sign
    return Compared(metric, sign, made, (only[0], only[1]), varied, base, code_lines(first, second))


def _sides(view: View) -> list[Side]:
    """Return the configurations of a sweep, best first."""
    values = {trial.configuration: trial.values for trial in reversed(view.sweep.trials)}
    return [Side(summary, comparable(values[summary.configuration])) for summary in summaries(view)]


def _by_key(sides: list[Side]) -> dict[str, list[Any]]:
    """Return the different values of each key, None where a configuration lacks it."""
    found: dict[str, list[Any]] = {}
    for key in dict.fromkeys(key for side in sides for key in side.values):
        every = [side.values.get(key) for side in sides]
        found[key] = [value for i, value in enumerate(every) if value not in every[:i]]
    return found


def _place(side: Side, varied: list[str]) -> str:
    return json.dumps([side.values.get(key) for key in varied])


def _pair(metric: str, varied: list[str], first: Side, second: Side) -> Pair:
    scores = [side.summary.values.get(metric, {}) for side in (first, second)]
    pair = compare(scores[1], scores[0]) if all(scores) else None
    return Pair({key: first.values.get(key) for key in varied}, first, second, pair)


def _tested(found: list[Pair], metric: str) -> list[Pair]:
    """Return the pairs with their p, judged together."""
    scored = {str(i): pair for i, pair in enumerate(found) if pair.comparison is not None}
    if not scored:
        return found
    scores = [{name: getattr(pair, side).summary.values[metric] for name, pair in scored.items()} for side in ("first", "second")]
    p = pairs(scores[0], scores[1])
    return [dataclasses.replace(pair, p=p.get(str(i))) for i, pair in enumerate(found)]


def comparable(values: Mapping[str, Any]) -> Leaves:
    """Return the values of a configuration by full key, under today's names, without its seed and what cannot change a result."""
    task = task_of(values)
    left_out = {"seed", task.KEYS.get("data_root"), *_neutral(config_class(task_name(values)), values)}
    names = old_keys(values)
    return {names.get(key, key): value for key, value in _leaves(values) if key not in left_out}


def _leaves(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _neutral(kind: Any, values: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Yield the keys that a configuration's class calls neutral, without building one: its method would import torch."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        key, value = f"{path}{field.name}", values.get(field.name)
        if field.metadata.get("neutral") is True:
            yield key
            yield from (f"{key}.{inner}" for inner, _ in _leaves(value if isinstance(value, Mapping) else {}))
        elif isinstance(value, Mapping) and dataclasses.is_dataclass(hints[field.name]) and not hasattr(hints[field.name], "kind_of"):
            yield from _neutral(hints[field.name], value, f"{key}.")


def as_json(found: Compared, first: View, second: View) -> dict[str, Any]:
    """Return a comparison as plain JSON values."""

    def side(of: Side) -> dict[str, Any]:
        spread, scores = of.summary.spreads[found.metric], of.summary.spreads
        about = {"configuration": of.summary.label, "mean": spread.mean, "std": spread.std, "n": spread.n}
        return {**about, "metrics": {name: dataclasses.asdict(known) for name, known in scores.items()}}

    def pair(of: Pair) -> dict[str, Any]:
        tested = {} if of.comparison is None else dataclasses.asdict(of.comparison)
        judged = {"p": of.p, "significant": of.better != 0, "higher": ("", "first", "second")[of.better]}
        return {"sets": of.sets, "first": side(of.first), "second": side(of.second), "difference": tested, "judged": judged}

    return {
        "sweeps": [str(view.sweep.path) for view in (first, second)],
        "metric": found.metric,
        "higher_is_better": found.sign > 0,
        "matched_by": found.varied,
        "configurations": [pair(of) for of in found.pairs],
        "only_first": [side(of) for of in found.only[0]],
        "only_second": [side(of) for of in found.only[1]],
        "base": [{"key": key, "first": a, "second": b} for key, a, b in found.base],
        "code": found.code,
    }


def shown(spread: Spread) -> str:
    """Return '73.1 ± 0.4 (3)', or '-' without a score."""
    return "-" if spread.mean is None or math.isnan(spread.mean) else f"{spread} ({spread.n})"
