"""Check a space as a whole, once, for every sampler, and values that a configuration may have."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from cnnjepa.run.command_line import did_you_mean
from cnnjepa.run.identity import from_dict, lookup, signature, to_dict
from jobs.task import task_of
from sweeps.spec.space import Dimension, Params, applied, baseline

MOST = 100_000  # seeds or configurations; catches a typo before hours of planning
_RESERVED = {
    "seed": "leave it out, and give the number of seeds with --seeds",
    "cluster": "give --cluster",
    "run_dir": "give --runs-dir",
    "task": "give task= of the SweepSpec",
    "retry_failed": "give --retry-failed",
    "start_again": "give --start-again",
}


def check_free(key: Any, rule: str) -> None:
    """Raise ValueError, which begins with `rule`, at a key that the launcher sets itself."""
    if not isinstance(key, str):
        raise ValueError(f"a key must be a text; got {key!r}, a {type(key).__name__}")
    remedy = _RESERVED.get(key.partition(".")[0])
    if remedy:
        raise ValueError(f"{rule} {key}, which the launcher sets; got it: {remedy}")


def check_value(key: str, value: Any, what: str = "") -> None:
    """Raise ValueError unless a configuration can be given `value` for `key`, or a space if `what` names its part.

    A configuration may also have a list.
    """
    if type(value) in (str, int, bool) or (type(value) is float and math.isfinite(value)):
        return
    if type(value) is list and not what and all(type(v) in (str, int, float, bool) for v in value):
        return
    remedy = "leave it out"
    if isinstance(value, Mapping):
        inner = next(iter(value), "KEY")
        remedy = f"give each key by itself, as {key}.{inner}"
    elif what and isinstance(value, (list, tuple)):
        remedy = "compare lists as configurations=[...]"
    elif value is None:
        remedy = "leave it out, or write '' for no text"
    shown = f"{value!r}, a {type(value).__name__}" if not isinstance(value, float) else f"{value}"
    kinds = "texts, finite numbers or booleans" if what else "a text, a finite number, a boolean or a list of these"
    raise ValueError(f"{what or 'the value'} of {key} must be {kinds}; got {shown}: {remedy}")


def check_dimension(d: Dimension) -> None:
    """Raise ValueError if the dimension by itself makes no sense."""
    check_free(d.key, "a space must not hold")
    for value in d.options:
        check_value(d.key, value, "options")
    if d.options:
        return
    numbers = [v for v in (d.low, d.high) if isinstance(v, bool) or not isinstance(v, (int, float))]
    if numbers:
        raise ValueError(f"bounds of {d.key} must be numbers; got {numbers[0]!r}, a {type(numbers[0]).__name__}")
    if not isinstance(d.log, bool):
        raise ValueError(f"log of {d.key} must be True or False; got {d.log!r}, a {type(d.log).__name__}")
    if (d.low, d.high) == (0.0, 0.0) and not d.whole and not d.grid:
        raise ValueError(f"dimension {d.key} must have options, or two bounds; got none: give some, or leave it out")
    if not -math.inf < d.low < d.high < math.inf or (d.log and d.low <= 0):
        one = f": for one value, give {d.key}={d.low} in the overrides of the scale" if d.low == d.high else ""
        rule = "have low < high, both finite, and low > 0 with log=True"
        raise ValueError(f"dimension {d.key} must {rule}; got [{d.low}, {d.high}]{one}")
    if d.whole:
        _check_whole(d)
    elif (d.high - d.low) / math.ulp(max(abs(d.low), abs(d.high))) < MOST:
        raise ValueError(f"bounds of {d.key} must lie apart by more than rounding errors; got [{d.low}, {d.high}]: use choice")
    outside = [v for v in d.grid if not d.holds(v)]
    if outside:
        raise ValueError(f"grid of {d.key} must {d.said}; got {outside[0]}")
    if twice := [v for i, v in enumerate(d.grid) if v in d.grid[:i]]:
        raise ValueError(f"grid of {d.key} must hold each value once; got {twice[0]} twice")


def check_one_kind(d: Dimension) -> None:
    """Raise ValueError if the options are of several kinds: a value of a command has one."""
    kinds = {"text" if isinstance(v, str) else "bool" if isinstance(v, bool) else "number": v for v in d.options}
    if len(kinds) > 1:
        one, other = list(kinds.values())[:2]
        raise ValueError(f"options of {d.key} must be all texts, all numbers or all booleans; got {one!r} and {other!r}: write texts")


def _check_whole(d: Dimension) -> None:
    for value in (d.low, d.high, *d.grid):
        if not isinstance(value, int) or isinstance(value, bool) or abs(value) >= 2**53:
            raise ValueError(f"bounds and grid of {d.key} must be whole numbers below 2^53; got {value!r}: use real for others")
    if isinstance(d.step, bool) or not isinstance(d.step, int) or not 1 <= d.step <= d.high - d.low:
        raise ValueError(f"step of {d.key} must be a whole number from 1 to high - low; got {d.step}")
    if (d.high - d.low) % d.step:
        last = d.whole_numbers[-1]
        rule = f"high of {d.key} must be reached from {d.low} in steps of {d.step}"
        raise ValueError(f"{rule}; got {d.high}: write {last} or {last + d.step}")
    if d.log and d.step != 1:
        raise ValueError(f"step of {d.key} must be 1 with log=True; got {d.step}: leave one of them out")


def leaves(values: Mapping[str, Any], path: str = "") -> list[str]:
    """Return the dotted keys of nested dicts that hold a value."""
    found = []
    for key, value in values.items():
        found += leaves(value, f"{path}{key}.") if isinstance(value, dict) else [f"{path}{key}"]
    return found


def _check_keys(space: Sequence[Dimension], base: Mapping[str, Any]) -> None:
    keys, known = [d.key for d in space], leaves(base)
    threads = task_of(base).KEYS.get("threads")
    for d in space:
        if keys.count(d.key) > 1:
            raise ValueError(f"a space must hold each key once; got {d.key} {keys.count(d.key)} times: merge them")
        if d.key not in known:
            if inside := [key for key in known if key.startswith(f"{d.key}.")]:
                remedy = f"search {inside[0]} and the like, or compare groups as configurations"
                raise ValueError(f"a dimension must be a key with one value; got {d.key}, a group of keys: {remedy}")
            if hint := did_you_mean(d.key, known, cutoff=0.8):
                raise ValueError(f"a dimension must be a key of the configuration; got {d.key}{hint}")
            lookup(base, d.key)  # says that the key may belong to another method
        if d.key == threads:
            raise ValueError(f"{d.key} must be left to cluster.cores_per_trial; got a dimension: leave it out")
        if isinstance(lookup(base, d.key), list):
            raise ValueError(f"a dimension must have one value; got {d.key}, which has a list: compare lists as configurations=[...]")


def _check_conditions(space: Sequence[Dimension]) -> None:
    earlier: dict[str, Dimension] = {}
    for d in space:
        if d.when is not None:
            if not isinstance(d.when, tuple) or len(d.when) != 2:
                raise ValueError(f"when of {d.key} must be a key and its values, as in when=('a.b', (1, 2)); got {d.when!r}")
            key, values = d.when
            assert isinstance(values, tuple)
            if key not in earlier:
                later = any(o.key == key for o in space)
                hint = ": put it before" if later else did_you_mean(str(key), earlier)
                rule = f"when of {d.key} must name an earlier dimension of the space"
                raise ValueError(f"{rule}; got {key}, which is {'a later one' if later else 'none'}{hint}")
            wrong = [v for v in values if not earlier[key].holds(v)]
            if wrong or not values:
                hint = did_you_mean(str(wrong[0]), [str(o) for o in earlier[key].options]) if wrong else ""
                raise ValueError(f"when of {d.key} must hold values of {key}, which must {earlier[key].said}; got {wrong or 'none'}{hint}")
        earlier[d.key] = d


def reaching(space: Sequence[Dimension], base: Mapping[str, Any], dimension: Dimension) -> Params:
    """Return the unchanged configuration's choices, changed as little as it takes for `dimension` to matter."""
    chosen: Params = {}
    by_key = {d.key: d for d in space}
    forced: Params = {}
    d: Dimension | None = dimension
    while d is not None and d.when is not None:
        key, values = d.when
        assert isinstance(values, tuple)
        now = lookup(dict(base), key)
        forced[key] = now if now in values else values[0]
        d = by_key[key]
    for d in space:
        if d.matters(chosen, base):
            chosen[d.key] = forced.get(d.key, lookup(dict(base), d.key))
    return chosen


def ends(d: Dimension) -> Sequence[Any]:
    """Return the options of a dimension, or its two bounds."""
    return d.options or (d.low, d.high)


def borders(space: Sequence[Dimension], base: Mapping[str, Any]) -> list[Params]:
    """Return the unchanged configuration's choices, then these with each option or bound of each dimension."""
    return [baseline(space, base), *({**reaching(space, base, d), d.key: v} for d in space for v in ends(d))]


def _built(base: Mapping[str, Any], params: Params, d: Dimension, value: Any) -> Any:
    """Return the configuration; raise ValueError if a value has another type than its key."""
    try:
        return from_dict(applied(base, {**params, d.key: value}, int(base["seed"])))
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"values of {d.key} must fit it; got {value!r}: {error}") from error


def neutral_keys(space: Sequence[Dimension], base: Mapping[str, Any]) -> list[str]:
    """Return the keys of the dimensions that change no run ID, and so no result."""
    return _neutral({key: [signature(config) for config in configs] for key, configs in _at_ends(space, base).items()})


def _at_ends(space: Sequence[Dimension], base: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the configurations at the ends of each dimension, by its key."""
    return {d.key: [_built(base, reaching(space, base, d), d, value) for value in ends(d)] for d in space}


def _neutral(names: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the keys of the dimensions whose ends have one run ID; `names` are the run IDs at the ends of each."""
    return [key for key, found in names.items() if len(found) > 1 and len(set(found)) == 1]


def checked_space(space: Sequence[Dimension], train: Any, costs: bool = False) -> tuple[list[Dimension], list[str]]:
    """Check a space around the configuration `train`, for every sampler; return what is searched, and lines to show.

    A dimension that changes no run ID cannot change a result. It keeps its value, and a line says
    so, unless `costs` is an objective. Raise ValueError at the first broken rule.
    """
    base = to_dict(train)
    for d in space:
        check_dimension(d)
    _check_keys(space, base)
    _check_conditions(space)
    baseline(space, base)
    built = _at_ends(space, base)
    ids = {key: [signature(config) for config in configs] for key, configs in built.items()}
    neutral = _neutral(ids)
    for d in space:
        params = reaching(space, base, d)
        if not d.options and not d.whole and all(float(value).is_integer() for value in ends(d)):
            _built(base, params, d, float(d.low))  # whole bounds do not make its key one of parts of a number
        for config in built[d.key]:
            task_of(train).validate(config)
        for value in d.grid:
            _built(base, params, d, value)
        names = [repr(lookup(to_dict(config), d.key)) for config in built[d.key]] if d.key in neutral else ids[d.key]
        if twice := [i for i, name in enumerate(names) if name in names[:i]]:
            one, other = ends(d)[names.index(names[twice[0]])], ends(d)[twice[0]]
            raise ValueError(f"options of {d.key} must give different runs; got {one!r} and {other!r}: leave one out")
    if costs or not neutral:
        return list(space), []
    kept = [d for d in space if d.key not in neutral]
    for d in kept:
        if d.when is not None and d.when[0] in neutral:
            raise ValueError(f"when of {d.key} must name a key that can change a result; got {d.when[0]}: leave both out")
    if not kept:
        rule = "a space must hold a key that can change a result"
        raise ValueError(f"{rule}; got {', '.join(neutral)}: add one, or search for few hours too with --two-objectives")
    shown = [f"{key} cannot change a result: it is not searched and stays {lookup(base, key)}" for key in neutral]
    return kept, shown


def refuse_chosen_weights(train: Any, chosen: Sequence[str]) -> None:
    """Raise ValueError if a search chooses weights, or the encoder that starts from them: these are read when it is planned."""
    source = task_of(train).KEYS.get("weights")
    if source is None:
        return
    part = f"{source.rpartition('.')[0]}." if task_of(train).get(train, "weights", "") else source
    if of_weights := [key for key in chosen if key.startswith(part)]:
        rule = "choose neither weights nor the encoder that starts from them, which are read when it is planned"
        raise ValueError(f"a search must {rule}; got {of_weights[0]}: use configurations")
