"""Give TensorBoard the names of trials: tensorboard/03-depth2-seed43 in the sweep folder is a link to a run's curves."""

import os
from contextlib import suppress
from pathlib import Path

from sweeps.spec.sweep import Trial
from sweeps.state.folder import Sweep

_OF_TRIALS = Path("..", "trials")


def link(sweep: Sweep, trial: Trial) -> None:
    """Give the curves of a trial its name; a name that it had before is removed.

    Only TensorBoard reads the links, so a file system without them does no harm.
    """
    folder, target = sweep.path / "tensorboard", str(_OF_TRIALS / trial.signature / "tensorboard")
    with suppress(OSError):
        folder.mkdir(exist_ok=True)
        for path in folder.glob(f"{trial.number:02d}-*"):
            if path.name != trial.name and path.is_symlink() and os.readlink(path) == target:
                path.unlink()
        with suppress(FileExistsError):
            os.symlink(target, folder / trial.name)


def link_all(sweep: Sweep) -> None:
    """Give all curves that are there the names of their trials."""
    for trial in sweep.trials:
        if sweep.run(trial).tensorboard.is_dir():
            link(sweep, trial)
