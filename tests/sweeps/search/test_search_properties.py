"""Random spaces, samplers, budgets and made-up results: a search ends by itself, inside its space and budget, and repeats nothing."""

import dataclasses
import itertools
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cnnjepa.run.folder import RunStatus
from cnnjepa.run.identity import lookup, to_dict
from sweeps.cli.plan import parse, plan
from sweeps.execution.scheduler import judge, next_claim
from sweeps.search import search
from sweeps.spec.space import Dimension, choice, real, whole
from sweeps.spec.sweep import FIRST_SEED, Scale, SweepSpec, Trial
from sweeps.state.claims import Process
from sweeps.state.folder import Sweep
from sweeps.state.view import View
from tests.support.searched import end
from tests.support.tiny import OVERRIDES

QUICK = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
LONG = settings(QUICK, max_examples=300, derandomize=False)
HOURS_PER_EPOCH = 0.5
# Keys whose every combination trains, with the values that the dimensions are made of; those of `tests/support/tiny.py` among them.
NUMBERS: dict[str, list[Any]] = {
    "optimizer.lr": [0.0005, 0.002, 0.01, 0.05],
    "optimizer.weight_decay": [0.001, 0.05, 0.1],
    "method.ema.momentum_start": [0.9, 0.996, 0.9999],
}
WHOLE: dict[str, list[int]] = {"method.predictor.depth": [1, 2, 3, 4], "epochs": [2, 4, 6, 8, 12], "probes.linear_paper_epochs": [3, 5, 9]}
WORDS: dict[str, list[Any]] = {
    "method.predictor.conv": ["depthwise", "dense", "pointwise"],
    "method.mask.strategy": ["mixed", "multi_block", "random"],
    "encoder.sync_bn": [False, True],
    "data.workers": [0, 1, 2],
}
BASE = SweepSpec("any", "?", *[Scale(OVERRIDES, 1, 1)] * 2, space=[real("optimizer.lr", 1e-9, 1.0)]).job("local", OVERRIDES).train


def unchanged(key: str) -> Any:
    value: Any = BASE
    for part in key.split("."):
        value = getattr(value, part)
    return getattr(value, "name", value)


@st.composite
def dimensions(draw: st.DrawFn) -> list[Dimension]:
    keys = draw(st.lists(st.sampled_from([*NUMBERS, *WHOLE, *WORDS]), min_size=1, max_size=4, unique=True))
    made: list[Dimension] = []
    for key in keys:
        when = None
        if parents := [d for d in made if d.options]:
            parent = draw(st.sampled_from(parents))
            of = draw(st.lists(st.sampled_from(list(parent.options)), min_size=1, max_size=2, unique=True))
            when = draw(st.sampled_from([None, None, (parent.key, tuple(of)), (parent.key, of[0])]))
        now = unchanged(key)
        if key in WORDS or draw(st.booleans()):
            every = {**NUMBERS, **WHOLE, **WORDS}[key]
            options = draw(st.lists(st.sampled_from(every), min_size=1, max_size=3, unique=True))
            made.append(choice(key, *dict.fromkeys([*options, now]), when=when))
        elif key in WHOLE:
            low, high = min(WHOLE[key]), max(WHOLE[key])
            step = draw(st.sampled_from([s for s in (1, 2) if (now - low) % s == 0]))
            made.append(whole(key, low, high - (high - low) % step, step=step, when=when))
        else:
            low, high = min([*NUMBERS[key], now]), max([*NUMBERS[key], now])
            made.append(real(key, low, high, now, log=draw(st.booleans()), when=when))
    return made


@dataclasses.dataclass(frozen=True)
class Case:
    space: list[Dimension]
    words: list[str]
    scores: list[float | None]  # None: the run fails
    budget: float | None

    @property
    def spec(self) -> SweepSpec:
        return SweepSpec("any", "?", *[Scale(OVERRIDES, 2, 5)] * 2, space=self.space)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    sampler = draw(st.sampled_from(["tpe", "random", "multi_fidelity", "gp"]))
    words = ["--sampler", sampler, "--max-trials", str(draw(st.integers(1, 9))), "--seeds", str(draw(st.integers(1, 2)))]
    words += ["--max-failures", str(draw(st.sampled_from([1, 3, 100])))]
    words += draw(st.sampled_from([[], ["--two-objectives"], ["--early-stopping", "none"]]))
    budget = draw(st.none() | st.floats(HOURS_PER_EPOCH * 4, 30.0))
    words += [] if budget is None else ["--budget-gpu-hours", repr(budget)]
    scores = st.floats(-5, 100) | st.sampled_from([0.0, 50.0, 50.0]) | st.none()
    return Case(draw(dimensions()), words, draw(st.lists(scores, min_size=1, max_size=5)), budget)


def planned(case: Case, path: Path) -> Sweep | None:
    """The sweep, or None if it is refused in one line."""
    try:
        return plan(case.spec, parse(case.spec, ["--dry-run", "--runs-dir", str(path), *case.words]))[0]
    except ValueError as error:
        said = str(error)
    assert said.isprintable()
    assert " must " in said, said
    assert not list(path.iterdir())
    return None


def ended(sweep: Sweep, score: Callable[[Trial], float | None], most: int = 60) -> list[Trial]:
    """One worker, whose runs end at once; each costs what its epochs cost, and less if a rung stops it."""
    begun: list[Trial] = []
    view = View(sweep)
    while (got := next_claim(view, Process.me().driver)) is not None:
        trial, value = got[0], score(got[0])
        stops = [e for e in sweep.rungs_of(trial) if value is not None and judge(view, trial)(e, {sweep.objective: value})]
        epochs = stops[0] if stops else trial.epochs
        status = RunStatus.pruned if stops else RunStatus.failed if value is None else RunStatus.completed
        with got[1]:
            reached = {} if value is None else {f"e{e}": value for e in sweep.rungs_of(trial) if e <= epochs}
            end(sweep, trial, None if stops else value, status, hours=HOURS_PER_EPOCH * epochs, **reached)
        begun.append(trial)
        assert len(begun) < most
    return begun


def check(case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        if (sweep := planned(case, path)) is None:
            return
        sweep = sweep.expecting(HOURS_PER_EPOCH)
        if case.budget is not None and HOURS_PER_EPOCH * sweep.trials[0].epochs > case.budget:
            return  # refused by check_budget
        sweep.write()
        assert Sweep.load(sweep.path) == sweep
        cycle = itertools.cycle(case.scores)
        begun = ended(sweep, lambda _: next(cycle))
        view = View(Sweep.load(sweep.path))
        assert search.is_over(view)
        search.why_over(view)
        firsts = [t for t in begun if t.seed == FIRST_SEED]
        assert len({t.signature for t in begun}) == len(begun)
        assert len({t.configuration_number for t in firsts}) == len(firsts)
        assert sweep.search is not None
        for trial in begun:
            chosen: dict = {}
            for d in sweep.search.space:
                assert (d.key in trial.params) is d.matters(chosen, sweep.search.base), (d, trial.params)
                if d.key in trial.params:
                    chosen[d.key] = trial.params[d.key]
                    assert d.holds(chosen[d.key])
                    assert lookup(trial.values, d.key) == chosen[d.key]
        spent = sum(r.device_hours for t in view.sweep.trials if (r := view.result(t)) is not None)
        assert case.budget is None or spent <= case.budget * (1 + 1e-9)
        stopped = search.Outlook(view).stopped
        everything = min(sweep.search.max_trials, sweep.search.size or sweep.search.max_trials)
        assert stopped or case.budget is not None or len(firsts) == everything


@pytest.mark.slow
@settings(QUICK, max_examples=12)
@given(cases())
def test_a_search_ends_by_itself_inside_its_space_and_budget_and_repeats_nothing(case: Case) -> None:
    check(case)


@pytest.mark.nightly
@LONG
@given(cases())
def test_any_search_ends_by_itself_inside_its_space_and_budget_and_repeats_nothing(case: Case) -> None:
    check(case)


def product(space: list[Dimension], base: dict, chosen: dict | None = None) -> list[dict]:
    """All combinations, in the plainest way."""
    chosen = chosen or {}
    if not space:
        return [chosen]
    first, *rest = space
    if first.when is not None:
        key, values = first.when
        if (chosen[key] if key in chosen else lookup(base, key)) not in values:  # type: ignore[operator]
            return product(rest, base, chosen)
    values = first.options or first.grid or range(int(first.low), int(first.high) + 1, first.step)
    return [made for value in values for made in product(rest, base, {**chosen, first.key: value})]


def check_grid(space: list[Dimension]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        case = Case(space, ["--sampler", "grid", "--seeds", "1"], [], None)
        wanted = product([d for d in space if d.key != "data.workers"], to_dict(BASE))
        if len(wanted) > 40 or math.prod(len(d.on_grid) for d in space) > 400:
            return
        if (sweep := planned(case, Path(folder))) is None:
            return
        assert len(sweep.trials) == len(wanted) == len({t.signature for t in sweep.trials})
        found = [{k: lookup(t.values, k) for k in params} for t, params in itertools.product(sweep.trials, wanted)]
        assert all(params in found for params in wanted)
        sweep.write()
        assert Sweep.load(sweep.path) == sweep


@pytest.mark.slow
@settings(QUICK, max_examples=8)
@given(dimensions())
def test_a_grid_is_the_product_of_what_its_conditions_allow(space: list[Dimension]) -> None:
    check_grid(space)


@pytest.mark.nightly
@LONG
@given(dimensions())
def test_any_grid_is_the_product_of_what_its_conditions_allow(space: list[Dimension]) -> None:
    check_grid(space)
