"""Choose what a search runs next: a further seed of a leading configuration, or a new one.

New work appears only when a trial ends; the worker that ended it asks for more. One live worker is
enough. The watching command adds workers if more could run.
"""

import itertools
import math
from functools import cached_property

from sweeps.search.configurations import Tried, tried
from sweeps.spec.space import all_configurations
from sweeps.spec.sweep import FIRST_SEED, Trial
from sweeps.state.folder import Sweep
from sweeps.state.view import View

FINALISTS = 2  # configurations that get all seeds, to compare the best with the next
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
    def hours(self) -> tuple[float, float | None]:
        """Return device-hours of ended trials, and of the most expensive epoch known or None."""
        spent, rates = 0.0, [] if self.search.hours_per_epoch is None else [self.search.hours_per_epoch]
        for trial in self.sweep.trials:
            result = self.view.result(trial) if self.view.state(trial).ended else None
            if result is None:
                continue
            cost = self.view.device_hours(trial)
            spent += cost
            epochs = epochs_done(trial, result.status.name, result.probes)
            if cost and epochs:
                rates.append(cost / epochs)
        return spent, max(rates, default=None)

    @cached_property
    def affordable(self) -> int | None:
        """Return how many runs fit the budget at the most expensive epoch known, None for any."""
        if self.search.budget_hours is None:
            return None
        spent, rate = self.hours
        pending = [t for p in self.tried for t, s in zip(p.trials, p.states, strict=True) if not s.ended]
        if rate is None:
            return 0 if pending or spent >= self.search.budget_hours else 1  # one run measures the cost
        epochs = self.sweep.trials[0].epochs
        left = self.search.budget_hours - spent - rate * epochs * len(pending)
        return max(int(left / (rate * epochs)), 0)

    @cached_property
    def untried(self) -> int:
        """Return how many configurations are still to be tried."""
        return max(self.search.max_trials - len(self.tried), 0)

    @cached_property
    def seeds_due(self) -> list[tuple[Tried, int]]:
        """Return leaders that lack a seed, with that seed, once every configuration was tried."""
        if self.untried or any(p.pending for p in self.tried if len(p.trials) == 1):
            return []
        # A leader by few seeds is included: among many configurations, one seed may be lucky.
        ranked = sorted((p for p in self.tried if p.scores), key=lambda p: (-p.mean, p.number))
        return [(p, 1 + max(t.seed for t in p.trials)) for p in ranked[:FINALISTS] if not p.pending and len(p.trials) < self.search.seeds]

    @property
    def to_begin(self) -> int:
        """Return how many further trials may begin now."""
        return 0 if self.sweep.cancelled else self.worth_beginning

    @property
    def worth_beginning(self) -> int:
        """Return how many further trials may begin if a cancelled search is resumed."""
        wanted = len(self.seeds_due) + self.untried
        return wanted if self.affordable is None else min(wanted, self.affordable)

    @property
    def runs_left_at_most(self) -> int:
        """Return how many further trials may be chosen if every one completes."""
        further = sum(self.search.seeds - len(p.trials) for p in self.tried if p.pending or p.scores)
        return self.untried * self.search.seeds + max(further, 0)


def epochs_expected(outlook: Outlook) -> float:
    """Return epochs to expect if one run in eta continues at each rung, and for leaders' seeds."""
    sweep, epochs = outlook.sweep, outlook.sweep.trials[0].epochs
    stages = [0, *sweep.rungs, epochs]
    of_one = sum((end - start) / math.pow(max(sweep.eta, 1), i) for i, (start, end) in enumerate(itertools.pairwise(stages)))
    return outlook.untried * of_one + FINALISTS * (outlook.search.seeds - 1) * epochs


def epochs_done(trial: Trial, status: str, probes: dict[str, dict[str, float]]) -> float:
    """Return the epochs that an ended trial trained, or 0 if unknown."""
    return float(trial.epochs) if status == "completed" else float(max(map(float, probes), default=0)) if status == "pruned" else 0.0


def choose(view: View) -> Trial | None:
    """Return the trial to begin next, not yet registered, or None."""
    outlook = Outlook(view)
    search, sweep = outlook.search, outlook.sweep
    if outlook.to_begin == 0:
        return None
    if outlook.seeds_due:
        leading, seed = outlook.seeds_due[0]
        return search.trial(sweep.next_number, leading.number, leading.trials[0].params, seed)
    from sweeps.search import sampler

    known = {t.signature for t in sweep.trials}
    drawn = itertools.islice(sampler.proposals(view, outlook.tried, sweep.next_number), _DRAWS)
    # If so many draws find nothing new, few are left: list them.
    for params in itertools.chain(drawn, all_configurations(search.space, search.base) or []):
        trial = search.trial(sweep.next_number, sweep.next_number, params, FIRST_SEED)
        if trial.signature not in known:
            return trial
    return None


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


def trials_to_begin(view: View) -> int:
    """Return how many further trials may begin now; 0 without a search."""
    return Outlook(view).to_begin if view.sweep.search is not None else 0


def to_take_up(view: View) -> int:
    """Return how many further trials may begin if the search is resumed; 0 without one."""
    return Outlook(view).worth_beginning if view.sweep.search is not None else 0


def is_judged(sweep: Sweep, trial: Trial) -> bool:
    """Return whether a rung may end the trial: never one that only adds a seed."""
    return bool(sweep.rungs) and (sweep.search is None or trial.number == trial.configuration_number)
