"""Slots in rounds, for those who place them themselves: one for each trial that may begin, until all have returned, and again."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Protocol

from sweeps.execution.monitor import progress_made
from sweeps.search.search import to_come
from sweeps.state.folder import TrialState, View

REFRESH_SECONDS = 1.0


class Shows(Protocol):
    """Is asked to show where the sweep stands while slots run."""

    def show(self) -> None:
        """Look and show."""


def run_round(
    view: View, place: Callable[[int, frozenset[Path]], list[str]], parallel: int, watcher: Shows, stopped: Callable[[], bool]
) -> bool:
    """Place slots for all trials that may begin now, and wait until they have returned; False where there are none.

    Raises RuntimeError where slots end before they claim a trial, unless they were `stopped`.
    """
    before = progress_made(view)  # looked at first: what another command chooses or begins from now on may leave our slots nothing
    states = view.states().values()
    ours = sum(s in (TrialState.waiting, TrialState.interrupted) for s in states) + to_come(view)
    if not ours:
        return False
    slots = ours if view.sweep.search is None else parallel  # one waits for what another's end brings about
    errors = _watch_while(partial(place, slots, view.watch.silent), watcher)
    if not stopped() and progress_made(view) == before:
        raise RuntimeError(f"slots end before they claim a trial: {(errors or ['without an error'])[0]}")
    return True


def _watch_while(work: Callable[[], list[str]], watcher: Shows) -> list[str]:
    """What `work` returns, run in a thread while the sweep is shown; what it raises is raised here."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        while not wait([future], REFRESH_SECONDS).done:
            watcher.show()
        watcher.show()
        return future.result()
