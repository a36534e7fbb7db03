"""Choose what a search runs next: a further seed of a leading configuration, or a new one.

New work appears only when a trial ends; the worker that ended it asks for more. One live worker is
enough. The watching command adds workers if more could run.
"""

import itertools
import json
import math
from dataclasses import replace
from functools import cached_property
from typing import Any

from cnnjepa.run.identity import length
from sweeps.search.configurations import Tried, tried
from sweeps.spec.check import borders
from sweeps.spec.space import applied
from sweeps.spec.sweep import FIRST_SEED, Trial, new_runs
from sweeps.state.folder import Sweep
from sweeps.state.trial_state import TrialState
from sweeps.state.view import View

FINALISTS = 2  # configurations that get all seeds, to compare the best with the next; so does the baseline
_DRAWS = 50  # of the sampler, before the space is listed


class Outlook:
    """What a search may begin now. Writes nothing."""

    def __init__(self, view: View) -> None:
        """Read what has changed since the view was last read."""
        view.sweep.grow()
        assert view.sweep.search is not None
        self.view, self.sweep, self.search = view, view.sweep, view.sweep.search
        self.tried = tried(view)

    @cached_property
    def _costs(self) -> tuple[float, list[tuple[object, float]]]:
        """Return device-hours of ended trials, and device-hours of an epoch with the shape of each that is known."""
        spent, rates = 0.0, []
        if self.search.hours_per_epoch is not None:
            rates.append((self.sweep.task.cost_shape(self.search.base), self.search.hours_per_epoch))
        for trial in self.sweep.trials:
            result = self.view.result(trial) if self.view.state(trial).ended else None
            if result is None:
                continue
            cost = self.view.device_hours(trial)
            spent += cost
            epochs = epochs_done(trial, result.status.name, result.probes)
            if cost and epochs:
                rates.append((self.sweep.task.cost_shape(trial.values), cost / epochs))
        return spent, rates

    @property
    def hours(self) -> tuple[float, float | None]:
        """Return device-hours of ended trials, and of the most expensive epoch known or None."""
        spent, rates = self._costs
        return spent, max((rate for _, rate in rates), default=None)

    def price(self, values: dict[str, Any]) -> float | None:
        """Return device-hours of a run of `values` at the most expensive epoch known of its shape, or of any; None if none is."""
        shape, rates = self.sweep.task.cost_shape(values), self._costs[1]
        alike = [rate for other, rate in rates if other == shape] or [rate for _, rate in rates]
        return max(alike) * length(values) if alike else None

    @cached_property
    def left(self) -> float:
        """Return device-hours that the budget leaves beside what was spent and what is pending; infinite without one."""
        if self.search.budget_hours is None:
            return math.inf
        pending = [t for p in self.tried for t, s in zip(p.trials, p.states, strict=True) if not s.ended]
        prices = [self.price(t.values) for t in pending]
        # While no price is known, a single run measures it.
        return self.search.budget_hours - self.hours[0] - sum(math.inf if price is None else price for price in prices)

    def affords(self, values: dict[str, Any]) -> bool:
        """Return whether the budget leaves room for a run of `values`."""
        return self.left > 0 and (self.price(values) or 0.0) <= self.left

    @cached_property
    def cheapest(self) -> float | None:
        """Return the lowest price of a run in the space, or None if unknown."""
        prices = [self.price(applied(self.search.base, params, FIRST_SEED)) for params in borders(self.search.space, self.search.base)]
        return min((p for p in prices if p is not None), default=None)

    def _fitting(self, left: float) -> int:
        if self.cheapest is None:
            return int(left > 0)  # one run measures the cost
        return max(int(left / self.cheapest), 0)

    @cached_property
    def failures(self) -> int:
        """Return how many runs have failed, or completed without a value of the objective."""
        ended = [(s, v) for p in self.tried for s, v in zip(p.states, p.values, strict=True)]
        return sum(s is TrialState.failed or (s is TrialState.completed and v is None) for s, v in ended)

    @property
    def stopped(self) -> str:
        """Return why the search chooses nothing more, or "" if it may."""
        objective = self.sweep.objective
        if self.failures >= self.search.max_failures:
            remedy = "give --retry-failed once the cause is fixed, or allow more"
            return f"{self.failures} runs failed or have no {objective}, as many as --max-failures allows: {remedy}"
        blind = [p for p in self.tried if TrialState.completed in p.states and not p.scores]
        if blind and not self.sweep.task.declares_metrics and not any(p.scores for p in self.tried):
            return f"no run has {objective}, and the first has completed: correct the sweep's objective"
        return ""

    @cached_property
    def untried(self) -> int:
        """Return how many configurations are still to be tried; 0 if a worker found that none is left."""
        left = max(self.search.max_trials - len(self.tried), 0)
        return 0 if left and self.sweep.is_exhausted(self.situation) else left

    @property
    def situation(self) -> str:
        """Return all on which it depends whether a new configuration is left that the budget can pay."""
        s, ended = self.search, sum(state.ended for p in self.tried for state in p.states)
        return json.dumps([s.digest, s.max_trials, s.budget_hours, s.hours_per_epoch, self.sweep.next_number, ended])

    @cached_property
    def seeds_due(self) -> list[tuple[Tried, int]]:
        """Return leaders that lack a seed, with that seed, once every configuration was tried; last the baseline, for the comparison."""
        if self.untried or any(p.pending for p in self.tried if len(p.trials) == 1):
            return []
        # A leader by few seeds is included: among many configurations, one seed may be lucky.
        ranked = sorted((p for p in self.tried if p.scores), key=lambda p: (-self.sweep.sign * p.mean, p.number))
        due = [p for p in ranked[:FINALISTS] if not p.pending and len(p.trials) < self.search.seeds]
        # A budget is for the leaders first.
        if self.search.budget_hours is None or not (due or any(p.pending for p in ranked[:FINALISTS])):
            due += [p for p in self._baseline if p not in ranked[:FINALISTS] and not p.pending and len(p.trials) < self.search.seeds]
        return [(p, 1 + max(t.seed for t in p.trials)) for p in due]

    @property
    def _baseline(self) -> list[Tried]:
        """Return the configuration without changes if a run of it can be had: not if it has failed. Its further seeds are not pruned."""
        return [p for p in self.tried if p.number == 0 and (p.scores or TrialState.pruned in p.states)]

    @property
    def to_begin(self) -> int:
        """Return how many further trials may begin now."""
        return 0 if self.sweep.cancelled else self.worth_beginning

    @property
    def worth_beginning(self) -> int:
        """Return how many further trials may begin if a cancelled search is resumed."""
        if self.stopped:
            return 0
        if self.search.budget_hours is None:
            return len(self.seeds_due) + self.untried
        left, seeds = self.left, 0
        for leading, _ in self.seeds_due:
            if left > 0 and (price := self.price(leading.trials[0].values) or 0.0) <= left:
                left, seeds = left - price, seeds + 1
        return seeds + min(self.untried, self._fitting(left))

    @property
    def runs_left_at_most(self) -> int:
        """Return how many further trials may be chosen if every one completes."""
        further = sum(self.search.seeds - len(p.trials) for p in self.tried if p.pending or p.scores or p in self._baseline)
        return self.untried * self.search.seeds + max(further, 0)


def epochs_expected(outlook: Outlook) -> float:
    """Return epochs to expect if one run in eta continues at each rung, and for the seeds of leaders and baseline."""
    sweep = outlook.sweep
    every = [length(applied(outlook.search.base, p, FIRST_SEED)) for p in borders(outlook.search.space, outlook.search.base)]
    epochs = (min(every) + max(every)) / 2
    stages = [0, *(r for r in sweep.rungs if r < epochs), epochs]
    of_one = sum((end - start) / math.pow(max(sweep.eta, 1), i) for i, (start, end) in enumerate(itertools.pairwise(stages)))
    return outlook.untried * of_one + (FINALISTS + 1) * (outlook.search.seeds - 1) * epochs


def epochs_done(trial: Trial, status: str, probes: dict[str, dict[str, float]]) -> float:
    """Return the epochs that an ended trial trained, or 0 if unknown."""
    return float(trial.epochs) if status == "completed" else float(max(map(float, probes), default=0)) if status == "pruned" else 0.0


def choose(view: View) -> Trial | None:
    """Return the trial to begin next, not yet registered, or None.

    If the space holds nothing new that the budget can pay, note that in the sweep folder.
    """
    outlook = Outlook(view)
    search, sweep = outlook.search, outlook.sweep
    if outlook.to_begin == 0:
        return None
    for leading, seed in outlook.seeds_due:
        if outlook.affords(leading.trials[0].values):
            further = search.trial(sweep.next_number, leading.number, leading.trials[0].params, seed)
            return replace(further, label=leading.trials[0].label)
    if not outlook.untried:
        return None
    from sweeps.search import sampler

    known = {t.signature for t in sweep.trials}
    drawn = itertools.islice(sampler.proposals(view, outlook.tried, sweep.next_number), _DRAWS)
    # If so many draws find nothing new, few are left: list them.
    for params in itertools.chain(drawn, new_runs(search.space, search.base)):
        if not outlook.affords(applied(search.base, params, FIRST_SEED)):
            continue
        trial = search.trial(sweep.next_number, sweep.next_number, params, FIRST_SEED, [t.params for t in sweep.trials])
        if trial.signature not in known:
            return trial
    sweep.note_exhausted(outlook.situation)
    return choose(view)  # a leader may lack a seed


def begin(view: View) -> Trial | None:
    """Register and return the next trial, or None if none may begin."""
    while (trial := choose(view)) is not None:
        if view.sweep.register(trial):
            view.sweep.grow()
            return trial
        view.sweep.grow()  # another worker was first; choose again, knowing its choice
    return None


def is_over(view: View) -> bool:
    """Return whether every trial is settled and none may begin."""
    return all(s.settled for s in view.states().values()) and trials_to_begin(view) == 0


def why_over(view: View) -> str:
    """Return why a search that is over chose nothing more, or "" if it has done all that it was asked for."""
    if view.sweep.search is None or not is_over(view):
        return ""
    outlook = Outlook(view)
    search = outlook.search
    if outlook.stopped:
        return f"the search has stopped: {outlook.stopped}"
    if search.size is not None and len(outlook.tried) >= search.size:
        return f"all {search.size} configurations of the space were tried: nothing new is left"
    if search.budget_hours is not None and (len(outlook.tried) < search.max_trials or outlook.seeds_due):
        return f"no further run fits the budget of {search.budget_hours:g} device-hours, of which {outlook.hours[0]:.3g} are spent"
    return "nothing new is left in the space" if len(outlook.tried) < search.max_trials else ""


def trials_to_begin(view: View) -> int:
    """Return how many further trials may begin now; 0 without a search."""
    return Outlook(view).to_begin if view.sweep.search is not None else 0


def to_take_up(view: View) -> int:
    """Return how many further trials may begin if the search is resumed; 0 without one."""
    return Outlook(view).worth_beginning if view.sweep.search is not None else 0


def is_judged(sweep: Sweep, trial: Trial) -> bool:
    """Return whether a rung may end the trial: never one that only adds a seed."""
    return bool(sweep.rungs) and (sweep.search is None or trial.number == trial.configuration_number)
