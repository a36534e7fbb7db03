"""Early stopping by rungs: at a few epochs a run is compared with all runs that came so far, and goes on if it is among the best.

Asynchronous successive halving in its stopping form (Li et al., MLSys 2020): nobody waits for others. Optuna's SuccessiveHalvingPruner
decides alike, but notes the rungs in its own trials, which a study that is built from the run folders does not have.
"""

from collections.abc import Sequence

DEFAULT_ETA = 4
EARLIEST = 8  # in the first 1/8 of the epochs the order of configurations says little of their end: docs/how-it-works/search-measured.md


def rung_epochs(epochs: int, warmup_epochs: float, eta: int) -> list[int]:
    """Epochs at which runs are compared, each eta times the one before; none within the warm-up or the first eighth of the epochs."""
    found: list[int] = []
    epoch = epochs // eta
    while epoch >= max(epochs / EARLIEST, 1) and epoch > warmup_epochs:
        found.append(epoch)
        epoch //= eta
    return found[::-1]


def goes_on(value: float, others: Sequence[float], eta: int) -> bool:
    """Whether `value` is among the best 1/eta of itself and the `others` that reached the rung; with fewer than eta only the best is."""
    kept = max((len(others) + 1) // eta, 1)
    return sum(other > value for other in others) < kept
