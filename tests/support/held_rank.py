"""One rank of a job of the tests on Slurm: `python held_rank.py -u -m sweeps.execution.worker_main SUBMISSION`.

It is `python -u -m` that module, but rank 0 stands still at the step that the file `hold` in the runs folder names,
until that file is gone, or a signal asks the run to stop: then the run is not held again. So a fault strikes in the middle, however short
the training and however slow the machine.
"""

import os
import runpy
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HOLD = "hold"
LET_GO = "let-go-"  # and the name of a run's folder


def held_at(hold: Path) -> float:
    """The step that `hold` names; infinity where it is gone."""
    try:
        return float(hold.read_text())
    except FileNotFoundError:
        return float("inf")


def hold_in(runs: Path, stopped: Callable[[], bool]) -> None:
    """Let this process stand still once it has recorded the step; a run that was asked to stop goes on, and is not held again."""
    from cnnjepa.monitoring.recorder import Recorder  # it takes torch, and signals must be caught first

    record = Recorder.record

    def recorded(self: Recorder, kind: str, step: int, values: dict[str, Any]) -> None:
        record(self, kind, step, values)
        let_go = runs / f"{LET_GO}{self.folder.path.name}"
        while kind == "step" and step >= held_at(runs / HOLD) and not let_go.exists():
            if stopped():
                let_go.touch()
            time.sleep(0.02)

    Recorder.record = recorded  # type: ignore[method-assign]


def main() -> None:
    """As `-m` does it: the module is found from the folder that the job is in."""
    module, submission = sys.argv[-2:]
    sys.argv[1:] = [submission]
    sys.path[0] = os.getcwd()
    from jobs import cli

    catch = cli.stop_on_signals

    @contextmanager
    def caught() -> Iterator[cli.Stop]:
        with catch() as stop:
            if os.environ["SLURM_PROCID"] == "0":
                hold_in(Path(submission).parents[2], stop)
            yield stop

    cli.stop_on_signals = caught
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
