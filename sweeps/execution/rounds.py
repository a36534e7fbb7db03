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

    def for_us() -> int:
        states = view.states().values()
        return sum(s in (TrialState.waiting, TrialState.interrupted) for s in states) + trials_to_begin(view)

    # Read this first: from now on another command may take all trials from our workers.
    before = progress_made(view)
    if not (ours := for_us()):
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
    # Workers of a search may have found that nothing new is left to begin.
    if not stopped() and progress_made(view) == before and for_us():
        raise RuntimeError(f"workers end before they claim a trial: {(errors or ['without an error'])[0]}")
    return True
