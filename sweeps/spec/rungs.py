"""Early stopping by rungs: at a few epochs, a run continues only if it is among the best so far.

This is asynchronous successive halving (Li et al., MLSys 2020) in its stopping form: no run waits.
Optuna's SuccessiveHalvingPruner needs rungs in its own trials, which a rebuilt study does not have.
"""

from collections.abc import Sequence

DEFAULT_ETA = 4
EARLIEST = 8  # in the first 1/8 of the epochs, the order predicts little: docs/how-it-works/search-measured.md


def rung_epochs(epochs: int, warmup_epochs: float, eta: int) -> list[int]:
    """Return the epochs of rungs, a factor eta apart, after warm-up and the first eighth."""
    found: list[int] = []
    epoch = epochs // eta
    while epoch >= max(epochs / EARLIEST, 1) and epoch > warmup_epochs:
        found.append(epoch)
        epoch //= eta
    return found[::-1]


def goes_on(value: float, others: Sequence[float], eta: int) -> bool:
    """Return whether `value` is in the best 1/eta at the rung, or the best of fewer than eta."""
    kept = max((len(others) + 1) // eta, 1)
    return sum(other > value for other in others) < kept
