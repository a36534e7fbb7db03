"""What a search runs next: another seed of a configuration that is still among the best, or a configuration that nobody has tried.

New work appears only when a trial ends, and the worker that ended it asks for more: one live worker is enough. The watching command adds
workers where more could run.
"""

import itertools
import math
from functools import cached_property

from sweeps.search.configurations import Tried, tried
from sweeps.spec.space import all_configurations
from sweeps.spec.sweep import FIRST_SEED, Trial
from sweeps.state.folder import Sweep, View

FINALISTS = 2  # configurations that have all seeds at the end, so that the best is compared with its next
_DRAWS = 50  # of the sampler, until it is taken to find nothing new


class Outlook:
    """One look at a search: what may begin now. Nothing is written."""

    def __init__(self, view: View) -> None:
        """Reads what has changed since the view's last look."""
        view.sweep.grow()
        assert view.sweep.search is not None
        self.view, self.sweep, self.search = view, view.sweep, view.sweep.search
        self.tried = tried(view)

    @cached_property
    def hours(self) -> tuple[float, float | None]:
        """Device-hours of ended trials, and those of the most expensive epoch seen or expected, None while nothing is known of it."""
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
        """How many runs may begin, at the most expensive epoch known, with the search within its budget; None for any number.

        Where nothing is known one run begins, and the others wait for what it tells.
        """
        if self.search.budget_hours is None:
            return None
        spent, rate = self.hours
        pending = [t for p in self.tried for t, s in zip(p.trials, p.states, strict=True) if not s.ended]
        if rate is None:
            return 0 if pending or spent >= self.search.budget_hours else 1
        epochs = self.sweep.trials[0].epochs
        left = self.search.budget_hours - spent - rate * epochs * len(pending)
        return max(int(left / (rate * epochs)), 0)

    @cached_property
    def untried(self) -> int:
        """Configurations that are still to be tried."""
        return max(self.search.max_trials - len(self.tried), 0)

    @cached_property
    def seeds_due(self) -> list[tuple[Tried, int]]:
        """Configurations that have earned another seed, and that seed: when all have been tried, those that lead by their means.

        Whoever leads then by fewer seeds is asked too: many configurations have one lucky seed among them.
        """
        if self.untried or any(p.pending for p in self.tried if len(p.trials) == 1):
            return []
        ranked = sorted((p for p in self.tried if p.scores), key=lambda p: (-p.mean, p.number))
        return [(p, FIRST_SEED + len(p.trials)) for p in ranked[:FINALISTS] if not p.pending and len(p.trials) < self.search.seeds]

    @property
    def to_begin(self) -> int:
        """How many trials beyond those registered may begin now."""
        return 0 if self.sweep.cancelled else self.worth_beginning

    @property
    def worth_beginning(self) -> int:
        """How many may begin once the search, where a person has cancelled it, is taken up."""
        wanted = len(self.seeds_due) + self.untried
        return wanted if self.affordable is None else min(wanted, self.affordable)

    @property
    def runs_left_at_most(self) -> int:
        """Trials that may still be chosen, if every one of them completes."""
        further = sum(self.search.seeds - len(p.trials) for p in self.tried if p.pending or p.scores)
        return self.untried * self.search.seeds + max(further, 0)


def epochs_expected(outlook: Outlook) -> float:
    """Epochs that untried configurations will take if one in eta goes on at each rung, and the further seeds of the leaders."""
    sweep, epochs = outlook.sweep, outlook.sweep.trials[0].epochs
    stages = [0, *sweep.rungs, epochs]
    of_one = sum((end - start) / math.pow(max(sweep.eta, 1), i) for i, (start, end) in enumerate(itertools.pairwise(stages)))
    return outlook.untried * of_one + FINALISTS * (outlook.search.seeds - 1) * epochs


def epochs_done(trial: Trial, status: str, probes: dict[str, dict[str, float]]) -> float:
    """Epochs that an ended trial was trained for; 0 where that is not known."""
    return float(trial.epochs) if status == "completed" else float(max(map(float, probes), default=0)) if status == "pruned" else 0.0


def choose(view: View) -> Trial | None:
    """The trial that a worker should begin next, not yet registered; None where there is none now."""
    outlook = Outlook(view)
    search, sweep = outlook.search, outlook.sweep
    if outlook.to_begin == 0:
        return None
    if outlook.seeds_due:
        leading, seed = outlook.seeds_due[0]
        return search.trial(sweep.next_number, leading.number, leading.trials[0].params, seed)
    from sweeps.search import sampler

    known = {t.signature for t in sweep.trials}
    outcomes = [sampler.outcome(view, p) for p in outlook.tried]
    drawn = (sampler.suggest(outcomes, search, sweep.next_number, draw) for draw in range(_DRAWS))
    # Few are left where so many draws find none.
    for params in itertools.chain(drawn, all_configurations(search.space, search.base) or []):
        trial = search.trial(sweep.next_number, sweep.next_number, params, FIRST_SEED)
        if trial.signature not in known:
            return trial
    return None


def begin(view: View) -> Trial | None:
    """The next trial, registered; None where there is none now, or none in the space that is new."""
    while (trial := choose(view)) is not None:
        if view.sweep.register(trial):
            view.sweep.grow()
            return trial
        view.sweep.grow()  # another worker was first, and its choice counts in ours
    return None


def is_over(view: View) -> bool:
    """Whether every trial is settled and none may begin."""
    return all(s.settled for s in view.states().values()) and trials_to_begin(view) == 0


def trials_to_begin(view: View) -> int:
    """Trials beyond those of the sweep that may begin now; 0 where it is no search."""
    return Outlook(view).to_begin if view.sweep.search is not None else 0


def to_take_up(view: View) -> int:
    """The same of a search that is taken up, should a person have cancelled it."""
    return Outlook(view).worth_beginning if view.sweep.search is not None else 0


def is_judged(sweep: Sweep, trial: Trial) -> bool:
    """Whether a rung may end the trial: further seeds of a configuration are run to measure it, and go to their end."""
    return bool(sweep.rungs) and (sweep.search is None or trial.number == trial.configuration_number)
