"""Configurations that a search has tried, with their trials and scores."""

import statistics
from dataclasses import dataclass

from sweeps.spec.sweep import Trial
from sweeps.state.trial_state import TrialState
from sweeps.state.view import View


@dataclass
class Tried:
    """A configuration with its trials, one per seed, oldest first."""

    trials: list[Trial]
    states: list[TrialState]
    values: list[float | None]

    @property
    def number(self) -> int:
        """Return its number, which is that of its first trial."""
        return self.trials[0].configuration_number

    @property
    def pending(self) -> bool:
        """Return whether any of its trials has not ended."""
        return not all(s.ended for s in self.states)

    @property
    def scores(self) -> list[float]:
        """Return the objective of each completed trial that has a value."""
        return [v for s, v in zip(self.states, self.values, strict=True) if s is TrialState.completed and v is not None]

    @property
    def mean(self) -> float:
        """Return the mean of `scores`, which must not be empty."""
        return statistics.fmean(self.scores)


def tried(view: View) -> list[Tried]:
    """Return the configurations tried so far, by number."""
    found: dict[int, Tried] = {}
    for trial in view.sweep.trials:
        one = found.setdefault(trial.configuration_number, Tried([], [], []))
        one.trials.append(trial)
        one.states.append(view.state(trial))
        one.values.append(view.objective(trial) if one.states[-1].ended else None)
    return list(found.values())
