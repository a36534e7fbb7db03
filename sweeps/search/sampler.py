"""Ask Optuna for configurations, through studies built in memory from the run folders."""

import itertools
import math
import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, create_trial
from optuna.trial import TrialState as OptunaState

from sweeps.search import multi_fidelity
from sweeps.search.configurations import Tried
from sweeps.spec.space import Dimension, Params, Value
from sweeps.spec.sweep import Search, Trial
from sweeps.state.trial_state import TrialState
from sweeps.state.view import View

optuna.logging.set_verbosity(optuna.logging.WARNING)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)  # about TPE's multivariate mode

COMPLETE, PRUNED, FAIL = OptunaState.COMPLETE, OptunaState.PRUNED, OptunaState.FAIL
RUNNING, WAITING = OptunaState.RUNNING, OptunaState.WAITING
# Configurations drawn at random before a model is used.
STARTUP_TRIALS = 10


_STREAM = 8  # separates these random numbers from a trainer's (cnnjepa/randomness.py)


@dataclass(frozen=True)
class Outcome:
    """A configuration's record in a study."""

    params: Params
    state: OptunaState
    values: Sequence[float] = ()
    reports: Mapping[int, float] = field(default_factory=dict)  # epoch -> objective, if pruned


def distribution(dimension: Dimension) -> BaseDistribution:
    """Return Optuna's distribution for a dimension."""
    if dimension.options:
        return CategoricalDistribution(list(dimension.options))
    if dimension.whole:
        return IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log, step=dimension.step)
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log)


def random_of(search: Search, number: int, draw: int) -> np.random.Generator:
    """Return the random numbers of one draw for trial `number`."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((int(search.digest, 16), _STREAM, number, draw))))


def sampler_of(search: Search, number: int, draw: int) -> BaseSampler:
    """Return the sampler for trial `number`, seeded by it: a rebuilt study repeats no draw."""
    seed = int(random_of(search, number, draw).integers(2**63)) % 2**32
    if draw or search.sampler == "random":  # a model that repeated a configuration would repeat it again
        return RandomSampler(seed=seed)
    if search.sampler == "gp":
        return GPSampler(seed=seed, n_startup_trials=STARTUP_TRIALS)
    conditional = any(d.when is not None for d in search.space)
    return TPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS, multivariate=True, group=conditional, constant_liar=True)


def frozen(outcome: Outcome, space: Mapping[str, BaseDistribution], attributes: Mapping[str, str] | None = None) -> FrozenTrial:
    """Return a configuration as a trial of a study."""
    return create_trial(
        state=outcome.state,
        params=dict(outcome.params),
        distributions={key: space[key] for key in outcome.params},
        values=list(outcome.values) if outcome.state is COMPLETE else None,
        intermediate_values=dict(outcome.reports),
        user_attrs=dict(attributes or {}),
    )


def reports(view: View, trial: Trial) -> dict[int, float]:
    """Return epoch -> objective of the trial's probes that have a value."""
    return {int(float(e)): m[view.sweep.objective] for e, m in view.probes(trial).items() if view.sweep.objective in m}


def outcome(view: View, tried: Tried) -> Outcome:
    """Return what the sampler learns: the mean over seeds, or how far a pruned run came.

    It maximises. Of an objective of which lower is better it learns the negative.
    """
    assert view.sweep.search is not None
    sign = view.sweep.sign
    first, params = tried.trials[0], tried.trials[0].params
    if tried.scores:
        hours = [r.device_hours for t in tried.trials if (r := view.result(t)) is not None and r.device_hours]
        costs = [statistics.fmean(hours)] if view.sweep.search.costs and hours else []
        return Outcome(params, COMPLETE, [sign * tried.mean, *costs])
    if not tried.states[0].ended:
        return Outcome(params, RUNNING)
    if tried.states[0] is TrialState.pruned and not view.sweep.search.costs:
        return Outcome(params, PRUNED, reports={epoch: sign * value for epoch, value in reports(view, first).items()})
    return Outcome(params, FAIL)


def runs(view: View) -> list[multi_fidelity.Run]:
    """Return what the multi-fidelity model learns: each run's scores, also of one that was stopped or still goes on.

    Higher is better: scores of a minimised objective change their sign.
    """
    found, sign = [], view.sweep.sign
    for trial in view.sweep.trials:
        state, last = view.state(trial), view.objective(trial)
        scores = {**reports(view, trial), **({} if last is None else {trial.epochs: last})}
        scores = {epoch: sign * score for epoch, score in scores.items() if 0 < epoch <= trial.epochs and math.isfinite(score)}
        failed = state is TrialState.failed
        found.append(multi_fidelity.Run(trial.params, trial.seed, trial.epochs, scores, pending=not state.ended, failed=failed))
    return found


def proposals(view: View, tried: Sequence[Tried], number: int) -> Iterator[Params]:
    """Yield proposals for trial `number`: the sampler's own, then random ones."""
    search = view.sweep.search
    assert search is not None
    if search.sampler == "multi_fidelity":
        yield multi_fidelity.propose(multi_fidelity.Cube(search.space, search.base), runs(view), random_of(search, number, 0))
    else:
        yield suggest([outcome(view, p) for p in tried], search, number, 0)
    yield from (suggest([], search, number, draw) for draw in itertools.count(1))


def directions(costs: bool, sign: float = 1.0) -> list[StudyDirection]:
    """Return the directions: maximise the objective, or minimise it with sign -1; minimise device-hours if `costs`."""
    return [StudyDirection.MAXIMIZE if sign > 0 else StudyDirection.MINIMIZE, StudyDirection.MINIMIZE][: 1 + costs]


def suggest(past: Sequence[Outcome], search: Search, number: int, draw: int) -> Params:
    """Return the sampler's proposal for trial `number` after `past`; it is deterministic."""
    sampler = sampler_of(search, number, draw)
    study = optuna.create_study(directions=directions(search.costs), sampler=sampler)
    space = {d.key: distribution(d) for d in search.space}
    if not isinstance(sampler, RandomSampler):
        study.add_trials([frozen(t, space) for t in past if t.params.keys() <= space.keys() and t.state is not FAIL])
    asked = study.ask()
    chosen: Params = {}
    for dimension in search.space:
        if dimension.matters(chosen, search.base):
            chosen[dimension.key] = draw_from(asked, dimension)
    return chosen


def draw_from(asked: optuna.Trial, dimension: Dimension) -> Value:
    """Draw a value of one dimension."""
    key = dimension.key
    if dimension.options:
        chosen = asked.suggest_categorical(key, list(dimension.options))
        assert isinstance(chosen, (str, int, float))
        return chosen
    if dimension.whole:
        return asked.suggest_int(key, int(dimension.low), int(dimension.high), log=dimension.log, step=dimension.step)
    return asked.suggest_float(key, dimension.low, dimension.high, log=dimension.log)
