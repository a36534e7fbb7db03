"""Run workers in rounds: one worker per trial that may begin, until all have returned."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

from sweeps.execution.monitor import progress_made
from sweeps.search.search import trials_to_begin
from sweeps.state.trial_state import TrialState
from sweeps.state.view import View

REFRESH_SECONDS = 1.0


def run_round(
    view: View,
    place: Callable[[int, frozenset[Path]], list[str]],
    parallel: int,
    show: Callable[[], None],
    stopped: Callable[[], bool],
    stop: Callable[[], None] | None = None,
) -> bool:
    """Run workers for all trials that may begin now, and `show` meanwhile; return False without any.

    If this is interrupted, call `stop` and return once the workers have saved.
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
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(place, workers, view.watch.silent)
        try:
            while not wait([future], REFRESH_SECONDS).done:
                show()
        except BaseException:
            if stop is not None:  # the pool waits for `place`
                stop()
            raise
        show()
        errors = future.result()
    view.look_again()  # a worker passes over a trial that was damaged meanwhile, which counts as an end
    if not stopped() and progress_made(view) == before:
        raise RuntimeError(f"workers end before they claim a trial: {(errors or ['without an error'])[0]}")
    return True
