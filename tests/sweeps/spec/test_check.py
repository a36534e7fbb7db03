"""Odd spaces, configurations and options: each is planned as its file says, or refused in one line before anything is planned."""

import dataclasses
import enum
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cnnjepa.run.identity import lookup
from jobs.config import compose_job
from sweeps.cli.plan import parse, plan
from sweeps.spec import check
from sweeps.spec.scales import SMOKE
from sweeps.spec.space import Dimension, choice, plain, real, whole
from sweeps.spec.sweep import Configuration, Scale, SweepSpec
from sweeps.state.folder import Sweep

LR, DEPTH, CONV, KERNEL = "optimizer.lr", "method.predictor.depth", "method.predictor.conv", "method.predictor.kernel"
NAN, INF = float("nan"), float("inf")
Made = Callable[[], SweepSpec]


def search(*space: object, name: str = "odd", seeds: object = 2, points: object = 4, **more: object) -> Made:
    """A search, made when it is planned: what a file says may be refused as it is read."""
    return lambda: SweepSpec(name, "?", *[Scale(SMOKE, seeds, points)] * 2, space=space, **more)  # type: ignore[arg-type]


def given(*overrides: dict, seeds: object = 1, **more: object) -> Made:
    return lambda: SweepSpec("odd", "?", *[Scale(SMOKE, seeds)] * 2, configurations=[Configuration(o) for o in overrides], **more)  # type: ignore[arg-type]


def paper(figures: object) -> Made:
    return lambda: dataclasses.replace(given({LR: 0.1})(), configurations=[Configuration({LR: 0.1}, figures)])  # type: ignore[arg-type]


def planned(spec: SweepSpec, path: Path, *words: str) -> Sweep:
    return plan(spec, parse(spec, ["--dry-run", "--runs-dir", str(path), *words]))[0]


class Conv(enum.Enum):
    depthwise = 1
    pointwise = 2


RATE, KIND = real(LR, 0.001, 0.1), choice(CONV, "depthwise", "dense", "pointwise")
REFUSED: dict[str, tuple[Made, list[str], str]] = {
    "bounds the wrong way round": (search(whole(DEPTH, 4, 1)), [], f"dimension {DEPTH} must have low < high, both finite"),
    "minus infinity": (search(real(LR, -INF, 1)), [], f"dimension {LR} must have low < high, both finite"),
    "no number": (search(real(LR, "0.1", 1)), [], f"bounds of {LR} must be numbers; got '0.1', a str"),  # type: ignore[arg-type]
    "true as a bound": (search(whole(DEPTH, True, 3)), [], f"bounds of {DEPTH} must be numbers; got True, a bool"),
    "a part of a whole number": (search(whole(DEPTH, 1, 3.5)), [], f"bounds and grid of {DEPTH} must be whole numbers below 2^53; got 3.5"),  # type: ignore[arg-type]
    "a grid that is no number": (
        search(whole(DEPTH, 1, 3, "2")),
        [],
        f"bounds and grid of {DEPTH} must be whole numbers below 2^53; got '2'",
    ),  # type: ignore[arg-type]
    "a grid beyond the range, for tpe too": (
        search(real(LR, 0.001, 0.1, 0.01, 0.2)),
        [],
        f"grid of {LR} must lie in [0.001, 0.1]; got 0.2",
    ),
    "a grid with one value twice": (
        search(real(LR, 0.001, 0.1, 0.01, 0.010)),
        [],
        f"grid of {LR} must hold each value once; got 0.01 twice",
    ),
    "a step of zero": (search(whole(DEPTH, 1, 3, step=0)), [], f"step of {DEPTH} must be a whole number from 1 to high - low; got 0"),
    "a step beyond the range": (
        search(whole(DEPTH, 1, 3, step=9)),
        [],
        f"step of {DEPTH} must be a whole number from 1 to high - low; got 9",
    ),
    "a bound between two steps": (
        search(whole(DEPTH, 1, 6, step=2)),
        [],
        f"high of {DEPTH} must be reached from 1 in steps of 2; got 6: write 5",
    ),
    "a step and a logarithm": (search(whole(DEPTH, 1, 3, step=2, log=True)), [], f"step of {DEPTH} must be 1 with log=True; got 2"),
    "a grid beside its steps": (search(whole(DEPTH, 1, 5, 2, step=2)), [], f"grid of {DEPTH} must lie in [1, 5] in steps of 2; got 2"),
    "a range of rounding errors": (
        search(real(LR, 0.01, float(np.nextafter(0.01, 1)))),
        [],
        f"bounds of {LR} must lie apart by more than rounding errors",
    ),
    "an option of another type": (search(choice(DEPTH, 3, "two")), [], f"values of {DEPTH} must fit it; got 'two'"),
    "a number for a switch": (search(choice("encoder.sync_bn", False, 1)), [], "values of encoder.sync_bn must fit it; got 1"),
    "an option that is not finite": (
        search(choice(LR, 0.01, INF)),
        [],
        f"options of {LR} must be texts, finite numbers or booleans; got inf",
    ),
    "an option that no rule admits": (search(choice(DEPTH, 3, 70)), [], f"{DEPTH} must lie in [1, 6]; got 70"),
    "an option of a condition that no rule admits": (
        search(KIND, choice(KERNEL, 3, 4, when=(CONV, "dense"))),
        [],
        f"{KERNEL} must be 3, 5, 7 or 9; got 4",
    ),
    "a word that is close": (
        search(real("optimiser.lr", 0.001, 0.1)),
        [],
        "a dimension must be a key of the configuration; got optimiser.lr",
    ),
    "a key of another method": (
        search(choice("method.temperature", 0.1, 0.2)),
        [],
        "the configuration must have method.temperature; got one",
    ),
    "a group of keys": (search(choice("optimizer", "byol_imagenet1k")), [], "got optimizer, a group of keys: search optimizer."),
    "a key twice": (search(RATE, choice(LR, 0.1, 0.2)), [], f"a space must hold each key once; got {LR} 2 times: merge them"),
    "a key again under a condition": (
        search(whole(DEPTH, 1, 3), KIND, whole(DEPTH, 2, 4, when=(CONV, "dense"))),
        [],
        f"a space must hold each key once; got {DEPTH} 2 times: merge them",
    ),
    "a list": (search(choice("probes.at_epochs", 1, 2)), [], "a dimension must have one value; got probes.at_epochs, which has a list"),
    "a key that is no text": (search(choice(3, 1, 2)), [], "a key must be a text; got 3, a int"),  # type: ignore[arg-type]
    "the cluster": (
        search(choice("cluster.gpus_per_trial", 1, 2)),
        [],
        "a space must not hold cluster.gpus_per_trial, which the launcher sets",
    ),
    "threads": (search(choice("threads", 1, 2), RATE), ["--two-objectives"], "threads must be left to cluster.cores_per_trial"),
    "a condition on a word that is close": (
        search(KIND, choice(KERNEL, 3, 5, when=(CONV, "depthwize"))),
        [],
        f"when of {KERNEL} must hold values of {CONV}, which must be one of ['depthwise', 'dense', 'pointwise']; got ['depthwize']; did",
    ),
    "a condition on its own key": (search(choice(KERNEL, 3, 5, when=(KERNEL, 3))), [], f"when of {KERNEL} must name an earlier dimension"),
    "a condition on a key that is not searched": (
        search(choice(KERNEL, 3, 5, when=(CONV, "dense"))),
        [],
        f"when of {KERNEL} must name an earlier dimension of the space; got {CONV}, which is none",
    ),
    "a condition without values": (search(KIND, choice(KERNEL, 3, 5, when=(CONV, ()))), [], f"when of {KERNEL} must hold values of {CONV}"),
    "a condition without a key": (search(KIND, choice(KERNEL, 3, 5, when=CONV)), [], f"when of {KERNEL} must be a key and its values"),  # type: ignore[arg-type]
    "a condition on what changes nothing": (
        search(choice("data.workers", 0, 1), choice(DEPTH, 1, 3, when=("data.workers", 0))),
        [],
        f"when of {DEPTH} must name a key that can change a result; got data.workers",
    ),
    "nothing that changes a result, as a grid": (
        search(whole("checkpoint.keep", 2, 3)),
        ["--sampler", "grid"],
        "a space must hold a key that can change a result; got checkpoint.keep",
    ),
    "a grid without end": (
        search(whole("data.train_limit", 0, 10**9)),
        ["--sampler", "grid"],
        "--sampler grid must have at most 100,000 combinations; got 1,000,000,001 values for data.train_limit alone",
    ),
    "a dimension of the scale alone": (
        lambda: dataclasses.replace(search(RATE)(), smoke=Scale(SMOKE, 1, 3, space=[choice("optimiser.lr", 0.1)])),
        [],
        "the space of the smoke scale must replace dimensions of the sweep's space; got optimiser.lr, which is none of them; did you mean",
    ),
    "half a seed": (given({LR: 0.1}, seeds=1.5), [], "smoke.seeds must be a whole number; got 1.5, a float"),
    "fewer than no configurations": (search(RATE, points=-1), [], "max_trials of the scale must be at least 1; got -1"),
    "no failure at all": (search(RATE), ["--max-failures", "0"], "--max-failures must be at least 1; got 0"),
    "a name of many bytes": (search(RATE, name="ö" * 60), [], "a sweep's name must have at most 100 bytes"),
    "no name": (search(RATE, name=""), [], "a sweep's name must be letters, digits"),
    "one seed among its configurations": (
        given({LR: 0.1}, {LR: 0.1, "seed": 7}),
        [],
        "a configuration must not set seed, which the launcher sets",
    ),
    "not a number": (given({LR: NAN}), [], f"the value of {LR} must be a text, a finite number, a boolean or a list of these; got nan"),
    "a list of lists": (given({"probes.at_epochs": [[1]]}), [], "the value of probes.at_epochs must be a text, a finite number"),
    "a function": (given({LR: len}), [], f"the value of {LR} must be a text"),
    "an array": (given({"probes.at_epochs": np.array([1, 2])}), [], "the value of probes.at_epochs must be a text"),
    "an objective that the probes do not give": (
        given({LR: 0.1}, objective="linear.holdout_top9"),
        [],
        "did you mean linear.holdout_top5?",
    ),
    "an objective of another set": (
        given({LR: 0.1}, objective="linear.pets.test_top1"),
        [],
        "objective must be a metric that the probes of",
    ),
    "an objective that one configuration lacks": (
        given({LR: 0.1}, {"probes.names": ["knn"]}),
        [],
        "objective must be a metric that the probes of names ['knn'] give; got linear.holdout_top1",
    ),
    "an objective that no rung sees": (
        search(RATE, objective="knn.test_top1"),
        [],
        "objective must be given during training for early stopping",
    ),
    "no probe": (search(RATE), ["probes.names=[]"], "got linear.holdout_top1, and no probe is configured"),
    "a column of another name": (
        given({LR: 0.1}, headline=("knn.top1",)),
        [],
        "headline must be a metric that the probes give; got knn.top1; did you",
    ),
    "a headline that is a text": (
        given({LR: 0.1}, headline="knn.test_top1"),
        [],
        "headline must be a tuple of texts; got the text 'knn.test_top1'",
    ),
    "a cost of another name": (
        given({LR: 0.1}, costs=("energy",)),
        [],
        "costs must be a metric that results.csv has; got energy; did you mean energy_kwh?",
    ),
    "figures of the paper of another name": (
        lambda: dataclasses.replace(given({LR: 0.1})(), configurations=[Configuration({LR: 0.1}, {"linear.test_top": 60.0})]),
        [],
        "paper must be a metric that the probes give, or a cost; got linear.test_top; did you mean linear.test_top5?",
    ),
    "names by a key of another name": (
        given({LR: 0.1}, named_by=("optimizer.rl",)),
        [],
        "named_by must hold keys that configurations set; got",
    ),
    "an objective that is no text": (
        given({LR: 0.1}, objective=["knn.test_top1"]),
        [],
        "objective must be a text; got ['knn.test_top1'], a list",
    ),
    "a headline of numbers": (given({LR: 0.1}, headline=(3,)), [], "headline[0] must be a text; got 3, a int"),
    "no costs": (given({LR: 0.1}, costs=None), [], "costs must be a list, each of which is a text; got None"),
    "a figure of the paper that is no number": (
        paper({"linear.test_top1": NAN}),
        [],
        "paper['linear.test_top1'] must be a finite number; got nan",
    ),
    "a figure of the paper without a name": (
        paper(60.0),
        [],
        "configurations[0].paper must be a dict of finite numbers; got 60.0, a float",
    ),
    "overrides of a configuration as words": (
        lambda: dataclasses.replace(given({LR: 0.1})(), configurations=[Configuration(["optimizer.lr=0.1"])]),  # type: ignore[arg-type]
        [],
        "configurations[0].overrides must be a dict; got ['optimizer.lr=0.1'], a list",
    ),
    "a dict for a configuration": (
        lambda: dataclasses.replace(given({LR: 0.1})(), configurations=[{LR: 0.1}]),  # type: ignore[list-item]
        [],
        "configurations[0] must be a Configuration; got {'optimizer.lr': 0.1}, a dict",
    ),
    "a space that can be read once": (
        lambda: dataclasses.replace(search(RATE)(), space=(d for d in [RATE])),  # type: ignore[arg-type]
        [],
        "space must be a list, each of which is a Dimension; got <generator",
    ),
    "a space of keys": (
        lambda: dataclasses.replace(search(RATE)(), space=[LR]),
        [],
        "space[0] must be a Dimension; got 'optimizer.lr', a str",
    ),  # type: ignore[list-item]
    "overrides of a scale as a text": (
        lambda: dataclasses.replace(given({LR: 0.1})(), paper=Scale("epochs=3", 1)),
        [],
        "paper.overrides must be a tuple of texts; got the text 'epochs=3': write ('epochs=3',)",
    ),
    "true configurations": (search(RATE, points=True), [], "max_trials of the scale must be a whole number, at least 1; got True, a bool"),
    "a range of parts for a whole number": (search(real(DEPTH, 1, 4)), [], f"values of {DEPTH} must fit it; got 1.0"),
    "a logarithm of another type": (search(real(LR, 0.001, 0.1, log="no")), [], f"log of {LR} must be True or False; got 'no', a str"),  # type: ignore[arg-type]
    "a limit that is not a number": (search(RATE), ["--max-gpu-hours", "nan"], "--max-gpu-hours must be positive and finite; got nan"),
    "a limit of a grid, which stops at nothing": (
        search(choice(DEPTH, 1, 3)),
        ["--sampler", "grid", "--max-failures", "3"],
        "--max-failures must be left out with --sampler grid",
    ),
    "a key in other letters": (search(real("Optimizer.LR", 0.001, 0.1)), [], "got Optimizer.LR; did you mean optimizer.lr?"),
    "options of a command of several kinds": (
        lambda: SweepSpec("odd", command=["/bin/echo", "{x}"], objective="y", space=[choice("x", 1, "b")]).resolved(),
        [],
        "options of x must be all texts, all numbers or all booleans; got 1 and 'b'",
    ),
    "a file for a folder": (given({LR: 0.1}), ["--runs-dir", __file__], "--runs-dir must be a folder; got"),
    "a warning of another name": (given({LR: 0.1}), ["--prune-on", "rank_me"], "; did you mean rankme?"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense_is_refused_in_one_line_and_nothing_is_planned(case: str, tmp_path: Path) -> None:
    make, words, said = REFUSED[case]
    with pytest.raises(ValueError, match=r".") as raised:
        planned(make(), tmp_path, *words)
    assert said in str(raised.value)
    assert str(raised.value).isprintable()
    assert list(tmp_path.iterdir()) == []


PLANNED: dict[str, tuple[Made, list[str], list[dict]]] = {
    "one word as a condition": (
        search(KIND, choice(KERNEL, 3, 5, when=(CONV, "dense"))),
        ["--sampler", "grid"],
        [{CONV: "depthwise"}, {CONV: "dense", KERNEL: 3}, {CONV: "dense", KERNEL: 5}, {CONV: "pointwise"}],
    ),
    "a condition on a condition": (
        search(KIND, choice(KERNEL, 3, 5, when=(CONV, ["dense"])), whole(DEPTH, 2, 3, when=(KERNEL, 5))),
        ["--sampler", "grid"],
        # Where the kernel is not chosen it is the unchanged one, 3.
        [{CONV: "depthwise"}, {CONV: "dense", KERNEL: 3}, *({CONV: "dense", KERNEL: 5, DEPTH: d} for d in (2, 3)), {CONV: "pointwise"}],
    ),
    "steps": (search(whole(DEPTH, 1, 5, step=2)), ["--sampler", "grid"], [{DEPTH: 3}, {DEPTH: 1}, {DEPTH: 5}]),
    "NumPy's": (
        search(whole(DEPTH, np.int64(2), np.int64(3)), choice("encoder.sync_bn", np.bool_(False), np.bool_(True))),
        ["--sampler", "grid"],
        [{DEPTH: d, "encoder.sync_bn": s} for d, s in [(3, False), (2, False), (2, True), (3, True)]],
    ),
    "NumPy's seeds": (
        search(choice(DEPTH, 2, 3), seeds=np.int64(1), points=np.int32(3)),
        ["--sampler", "grid"],
        [{DEPTH: 3}, {DEPTH: 2}],
    ),
    "half of NumPy's numbers": (
        search(real(LR, np.float32(0.01), np.float32(0.1), np.float32(0.01), np.float32(0.1))),
        ["--sampler", "grid"],
        [{LR: 0.01}, {LR: 0.1}],
    ),
    "an enum": (search(choice(CONV, *Conv)), ["--sampler", "grid"], [{CONV: "depthwise"}, {CONV: "pointwise"}]),
    "what cannot change a result": (
        search(choice("data.workers", 0, 2), whole(DEPTH, 2, 3)),
        ["--sampler", "grid"],
        [{DEPTH: 3}, {DEPTH: 2}],
    ),
}


@pytest.mark.parametrize("case", PLANNED)
def test_what_makes_sense_is_planned_as_the_file_says(case: str, tmp_path: Path) -> None:
    make, words, wanted = PLANNED[case]
    sweep = planned(make(), tmp_path, *words, "--seeds", "1")
    found = [t.values for t in sweep.trials]
    assert len(found) == len(wanted) == len({t.signature for t in sweep.trials})
    for params in wanted:
        assert any(all(lookup(values, key) == value for key, value in params.items()) for values in found), params


@pytest.mark.parametrize(
    "space",
    [
        [KIND, choice(KERNEL, 3, 5, when=(CONV, "dense"))],
        [whole("data.train_limit", 0, 2**31), real(LR, np.float32(0.001), 0.1, log=True)],
        [choice("encoder.sync_bn", True, False), whole(DEPTH, 1, 5, step=2)],
        [whole("epochs", 4, 4096, log=True)],
    ],
    ids=["a word as a condition", "a wide range", "switches and steps", "a logarithm"],
)
def test_a_search_is_the_same_before_and_after_its_file(space: list, tmp_path: Path) -> None:
    sweep = planned(search(*space)(), tmp_path)
    sweep.write()
    again = Sweep.load(sweep.path)
    assert again == sweep
    assert again.search is not None
    assert sweep.search is not None
    assert [d.matters({CONV: word}, {}) for d in again.search.space for word in ("dense", "depthwise")] == [
        d.matters({CONV: word}, {}) for d in sweep.search.space for word in ("dense", "depthwise")
    ]
    assert (sweep.path / "sweep.json").stat().st_size < 20_000  # a range is its bounds, however wide
    assert planned(search(*space)(), tmp_path) == sweep


def test_a_short_range_of_whole_numbers_is_the_search_that_it_was_in_version_0_1() -> None:
    """Its numbers were listed as its grid, and a search goes on by the hash of them."""
    assert whole("a", 1, 3).identity() == {
        **{"key": "a", "options": (), "low": 1, "high": 3, "log": False, "whole": True, "when": None},
        "grid": (1, 2, 3),
    }
    assert whole("a", 1, 5, step=2).identity()["step"] == 2
    assert whole("a", 1, 10**12).identity()["grid"] == ()


def test_scalars_become_pythons_own() -> None:
    values = plain([np.float32(0.1), np.float64(0.1), np.int16(3), np.bool_(True), Conv.depthwise, (1, np.int8(2)), "a"])
    assert values == [0.1, 0.1, 3, True, "depthwise", [1, 2], "a"]
    assert [type(v) for v in values[:4]] == [float, float, int, bool]


def test_the_borders_of_a_space_are_reached_through_its_conditions() -> None:
    space = [KIND, choice(KERNEL, 3, 5, when=(CONV, "dense")), whole(DEPTH, 2, 3, when=(KERNEL, 5))]
    base = {"method": {"predictor": {"conv": "depthwise", "kernel": 3, "depth": 3}}}
    assert check.reaching(space, base, space[2]) == {CONV: "dense", KERNEL: 5, DEPTH: 3}
    assert {CONV: "dense", KERNEL: 5, DEPTH: 2} in check.borders(space, base)
    assert check.borders(space, base)[0] == {CONV: "depthwise"}


def test_each_end_of_a_space_is_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[tuple[str, object]] = []
    build = check._built

    def counted(base: Any, params: Any, d: Dimension, value: object) -> Any:
        built.append((d.key, value))
        return build(base, params, d, value)

    monkeypatch.setattr(check, "_built", counted)
    space = [choice("method.predictor.depth", 1, 3), real("optimizer.lr", 0.001, 0.1, log=True), choice("data.workers", 0, 2)]
    kept, said = check.checked_space(space, compose_job(["cluster=local", "data=digits"]).train)
    assert [d.key for d in kept] == ["method.predictor.depth", "optimizer.lr"]
    assert said == ["data.workers cannot change a result: it is not searched and stays 0"]
    assert sorted(built, key=str) == sorted([(d.key, value) for d in space for value in check.ends(d)], key=str)
