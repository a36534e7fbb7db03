"""Run workers in rounds: one worker per trial that may begin, until all have returned."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Protocol

from sweeps.execution.monitor import progress_made
from sweeps.search.search import trials_to_begin
from sweeps.state.folder import TrialState, View

REFRESH_SECONDS = 1.0


class Shows(Protocol):
    """Display that is refreshed while workers run."""

    def show(self) -> None:
        """Refresh the display."""


def run_round(
    view: View, place: Callable[[int, frozenset[Path]], list[str]], parallel: int, watcher: Shows, stopped: Callable[[], bool]
) -> bool:
    """Run workers for all trials that may begin now; return False if there are none.

    Raise RuntimeError if workers end before they claim a trial, unless they were `stopped`.
    """
    # Read this first: from now on another command may take all trials from our workers.
    before = progress_made(view)
    states = view.states().values()
    ours = sum(s in (TrialState.waiting, TrialState.interrupted) for s in states) + trials_to_begin(view)
    if not ours:
        return False
    # In a search a worker waits for the trials that the end of another brings.
    workers = ours if view.sweep.search is None else parallel
    errors = _watch_while(partial(place, workers, view.watch.silent), watcher)
    view.look_again()  # a worker passes over a trial that was damaged meanwhile, which counts as an end
    if not stopped() and progress_made(view) == before:
        raise RuntimeError(f"workers end before they claim a trial: {(errors or ['without an error'])[0]}")
    return True


def _watch_while(work: Callable[[], list[str]], watcher: Shows) -> list[str]:
    """Run `work` in a thread and refresh the display; return or raise what it does."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        while not wait([future], REFRESH_SECONDS).done:
            watcher.show()
        watcher.show()
        return future.result()
