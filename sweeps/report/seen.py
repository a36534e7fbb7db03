"""Compute once what several parts of a page need: rows, summaries, and what is judged of the best."""

from functools import cached_property

from sweeps.report.aggregate import (
    Leader,
    Row,
    Spread,
    Summary,
    leader_of,
    leaders_of,
    references,
    rows,
    run_set,
    shown_configurations,
    summaries,
)
from sweeps.state.view import View


class Seen:
    """A sweep at one moment. Each part is computed when it is first asked for."""

    def __init__(self, view: View) -> None:
        """Take the view of the sweep, which must not be told to look again meanwhile."""
        self.view = view

    @cached_property
    def rows(self) -> list[Row]:
        """Return one row per trial."""
        return rows(self.view)

    @cached_property
    def table(self) -> list[Summary]:
        """Return one summary per configuration, the best first."""
        return summaries(self.view, self.rows)

    @cached_property
    def shown(self) -> tuple[list[Summary], str]:
        """Return the configurations to show people, and a line about those left out."""
        return shown_configurations(self.view, self.table)

    @cached_property
    def lead(self) -> Leader | None:
        """Return the best by the objective among all configurations, or None."""
        return leader_of(self.view, self.table, self.view.sweep.objective)

    @cached_property
    def leaders(self) -> dict[str, Leader | None]:
        """Return column -> leader, of the shown configurations."""
        return leaders_of(self.view, self.shown[0])

    @cached_property
    def references(self) -> dict[str, dict[str, Spread]]:
        """Return what scores are compared with, chance level for example."""
        return references(self.view)

    @cached_property
    def run_set(self) -> str:
        """Return which runs the means cover."""
        return run_set(self.view, self.rows)
