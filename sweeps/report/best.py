"""Write the score of the best, one number in every table, sentence, figure and status.

It is the estimate by seeds that did not select it (sweeps/report/winner.py), with its interval.
Where there is none, as with one run each, or nothing to select from, it is the mean of its runs.
"""

from sweeps.report.aggregate import Leader, form_of, in_units
from sweeps.report.looks import found_in_most
from sweeps.state.view import View


def score_of_best(view: View, lead: Leader) -> str:
    """Return '75.5 % (95 % interval 74.1 to 76.9)', or '75.5 ± 0.4 % (n = 3)' without an estimate."""
    number, beside = parts_of_best(view, lead)
    return f"{number} ({beside})"


def parts_of_best(view: View, lead: Leader) -> tuple[str, str]:
    """Return '75.5 %' and '95 % interval 74.1 to 76.9', or '75.5 ± 0.4 %' and 'n = 3'."""
    found, spread = lead.winner, lead.best.spreads[lead.metric]
    if not is_estimated(lead):
        return in_units(view, spread), f"n = {spread.n}"
    form = form_of(lead)
    number = in_units(view, f"{found.estimate:{form}}")
    if found.low is None or found.high is None:
        return number, f"n = {spread.n}"
    return number, f"95 % interval {found.low:{form}} to {found.high:{form}}"


def is_estimated(lead: Leader) -> bool:
    """Return whether the score of the best is by seeds that did not select it."""
    return lead.winner.estimate is not None and lead.other is not None


def how_estimated(lead: Leader) -> str:
    """Return how the score of the best was found, and the mean of its runs, or "" where that is the score."""
    spread = lead.best.spreads[lead.metric]
    if not is_estimated(lead):
        return ""
    return f"The score of the best is by seeds that did not select it; the mean of its own runs is {spread} (n = {spread.n})."


def looks_line(view: View, lead: Leader) -> str:
    """Return what a p means, and what can be found, where seeds are added until the best is decided; "" elsewhere."""
    if not (until := view.sweep.until):
        return ""
    both = [s.spreads[lead.metric].std for s in (lead.best, lead.other) if s is not None]
    spread = max((std for std in both if std is not None), default=0.0)
    most, form = until[1], form_of(lead)
    found = f"; a lead of {found_in_most(spread, until):{form}} over the next is found in 80 % of sweeps" if spread else ""
    seeds = max(lead.best.spreads[lead.metric].n, until[0])
    said = f"looks after {until[0]} to {most} seeds share 2.5 %: after {seeds} the best is called so if p is at most {lead.level:.2g}"
    return f"{said}{found}"
