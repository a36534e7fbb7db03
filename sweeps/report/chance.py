"""Tell which configurations score no better than guessing would: what they were meant to learn, they did not."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cnnjepa.run.folder import RunStatus
from jobs.task import score_format
from sweeps.report.aggregate import Spread, Summary, columns, in_units, shown_configurations, title
from sweeps.state.view import View

CHANCE = "chance level"  # the reference that a task gives its runs: cnnjepa/references.py
_ERRORS = 2.0  # standard errors above chance within which a score is one of guessing
_NAMED = 3  # configurations in a line


@dataclass(frozen=True)
class Guess:
    """What guessing gets by one metric, and the images that a score rests on."""

    level: float
    images: int


def guesses(view: View) -> dict[str, Guess]:
    """Return metric -> what guessing gets, of the columns of a table; {} for a task whose scores have no chance level."""
    found: dict[str, Guess] = {}
    for trial in view.sweep.trials:
        result = view.result(trial)
        if result is None or result.status is not RunStatus.completed:
            continue
        for metric, level in result.references.get(CHANCE, {}).items():
            if metric in result.images and (metric not in found or result.images[metric] < found[metric].images):
                found[metric] = Guess(level, result.images[metric])
    return {metric: found[metric] for metric in columns(view) if metric in found}


def error_of(view: View, guess: Guess, spread: Spread) -> float | None:
    """Return the standard error of a mean score that was guessed: of the choice of images, and over seeds. None if unknown."""
    sampling = view.sweep.task.sampling_error(guess.level, guess.images)
    if sampling is None:
        return None
    return math.hypot(sampling, (spread.std or 0.0) / math.sqrt(max(spread.n, 1)))  # all seeds see the same images


def at_chance(view: View, metric: str, guess: Guess, table: Sequence[Summary]) -> list[Summary]:
    """Return the configurations whose mean is not above chance level by more than two standard errors."""
    found = []
    for summary in table:
        spread = summary.spreads.get(metric)
        if spread is None or spread.mean is None or (error := error_of(view, guess, spread)) is None:
            continue
        if spread.mean <= guess.level + _ERRORS * error:
            found.append(summary)
    return found


def chance_lines(view: View, shown: Sequence[Summary] | None = None) -> list[str]:
    """Return a warning for each column in which a configuration is within error of chance level; [] where none is.

    `shown` are the configurations to look at, by default those of a table.
    """
    table, lines = shown_configurations(view)[0] if shown is None else shown, []
    form = score_format(view.sweep.task.UNIT, 1)
    for metric, guess in guesses(view).items():
        scored = [s for s in table if s.spreads[metric].mean is not None]
        found = at_chance(view, metric, guess, scored)
        if not found:
            continue
        error = view.sweep.task.sampling_error(guess.level, guess.images) or 0.0
        many = "all configurations" if len(found) == len(scored) > 1 else _named(found)
        level = in_units(view, f"{guess.level:{form}} ± {error:{form}}")
        lines.append(
            f"within error of chance by {title(view, metric)}: {many}, where guessing gets {level} of {guess.images:,} images: "
            "their differences mean nothing; train for more epochs, or on more images"
        )
    return lines


def _named(found: Sequence[Summary]) -> str:
    shown = ", ".join(s.label for s in found[:_NAMED])
    return shown + (f" and {len(found) - _NAMED} more" if len(found) > _NAMED else "")
