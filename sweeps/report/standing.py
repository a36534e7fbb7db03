"""Say in two lines which configuration leads so far, how sure that is, and where the baseline stands."""

from collections.abc import Sequence
from dataclasses import dataclass

from sweeps.report.aggregate import Leader, Summary, in_units, leader_of, summaries
from sweeps.report.best import score_of_best
from sweeps.state.view import View


@dataclass(frozen=True)
class Standing:
    """The best configuration so far and the baseline, in words."""

    best: str  # 'depth 2: 71.2 % (95 % interval 70.1 to 72.3) by knn; tied: 4 of 11 may be the best (p = 0.31)', or ""
    baseline: str
    leading: str = ""  # label of the best
    first: str = ""  # label of the baseline
    leader: Leader | None = None


def standing(view: View, table: Sequence[Summary] | None = None) -> Standing:
    """Return who leads now; `table` are the view's summaries, if they are known."""
    table = summaries(view) if table is None else table
    lead = leader_of(view, table, view.sweep.objective)
    first = view.sweep.trials[0]
    if lead is None:
        return Standing("", "", first=first.label)
    best = f"{lead.best.label}: {score_of_best(view, lead)} by {lead.metric}; {_verdict(lead)}"
    return Standing(best, _baseline(view, table, lead), lead.best.label, first.label, lead)


def _score(view: View, summary: Summary) -> str:
    """Return 'depth 2: 71.2 ± 0.4 % (n = 2)'."""
    spread = summary.spreads[view.sweep.objective]
    return f"{summary.label}: {in_units(view, spread)} (n = {spread.n})"


def _verdict(lead: Leader) -> str:
    found, every = lead.winner, 1 + len(lead.winner.against)
    if lead.other is None:
        return "no other has a score yet"
    if found.p is None:
        return "not tested: " + ("that needs two seeds of it" if lead.best.spreads[lead.metric].n < 2 else "that needs runs that differ")
    p = "p < 0.001" if found.p < 0.001 else f"p = {found.p:.2g}"
    if lead.significant:
        return f"significantly better than all others ({p})"
    return f"tied: {len(found.candidates)} of {every} may be the best ({p})"


def _baseline(view: View, table: Sequence[Summary], lead: Leader) -> str:
    """Return 'depth 1: 68.4 ± 0.6 % (n = 2); the best is tied with it'."""
    first = view.sweep.trials[0]
    base = next((s for s in table if s.key == first.configuration), None)
    if base is None or not base.values.get(lead.metric):
        return f"{first.label}: no score yet"
    if base.key == lead.best.key:
        return f"{first.label}: it is the best so far"
    word = "not tested against it" if lead.winner.p is None else "tied with it"
    if base.key in lead.winner.better_than:
        word = "significantly better"
    return f"{_score(view, base)}; the best is {word}"
