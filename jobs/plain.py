"""A task that is a dataclass and a function `train(config, run)`, for programs that know nothing of this project."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from cnnjepa.run.folder import RunError, RunFolder, RunResult
from cnnjepa.run.identity import FIDELITY
from cnnjepa.run.ranks import Device, Ranks, broadcast_object, joined, rank_count
from jobs.plain_config import FINGERPRINT, require_several, with_identity
from jobs.plain_run import Run, devices
from jobs.task import Judge

DIRECTIONS = ("maximize", "minimize")


class PlainTask:
    """A trainer that is a dataclass and a function: what `SweepSpec(task=...)` takes.

    `Config` has the field `seed`, and `epochs` or `steps`, which say how long a run trains; without
    either of them it gets `epochs` = 1. Each field needs a default. `train(config, run)` trains to
    the end, or until `run.report` returns False or `run.should_stop` is true.
    """

    def __init__(
        self,
        Config: type,
        train: Callable[[Any, Run], object],
        *,
        objective: str,
        direction: str = DIRECTIONS[0],
        unit: str = "",
        headline: Sequence[str] = (),
        minimized: Sequence[str] = (),
        version: str = "",
        data: Callable[[Any], str] | None = None,
        validate: Callable[[Any], None] | None = None,
        files: Sequence[str] = (),
        pickled: bool = False,
        hang_minutes: float = 0.0,
    ) -> None:
        """Take the trainer, and what tables need to know.

        Args:
            Config: dataclass of all that a run can be given.
            train: the trainer.
            objective: metric that ranks configurations, as `run.report` names it.
            direction: "maximize" or "minimize", of the objective.
            unit: of the scores, such as "%".
            headline: further metrics of the results table.
            minimized: further metrics of which lower is better.
            version: a text that is part of each run ID. A new one makes new runs.
            data: returns what identifies the data of a configuration, which is part of its run ID.
            validate: raises ValueError at a configuration that cannot be trained.
            files: further files and folders that the program reads, relative to its own.
            pickled: whether any Python object may be saved. Reading such a state runs code in it.
            hang_minutes: end a run that shows no progress for so long; 0 never does.
        """
        require_several(headline=headline, minimized=minimized, files=files)
        if direction not in DIRECTIONS:
            raise ValueError(f"direction must be one of {', '.join(DIRECTIONS)}; got {direction!r}")
        if not objective:
            raise ValueError("objective must name the metric that ranks configurations; got none")
        self._counts = next((key for key in FIDELITY if key in getattr(Config, "__dataclass_fields__", ())), "")
        self.Config = with_identity(Config, version, data is not None)
        self._train, self._data, self._validate = train, data, validate
        self.OBJECTIVE, self.UNIT, self.HEADLINE = objective, unit, tuple(headline)
        self.MINIMIZED = (*((objective,) if direction == "minimize" else ()), *minimized)
        self.KEYS: Mapping[str, str] = {"fingerprint": FINGERPRINT} if data is not None else {}
        self.FILES, self.pickled, self.hang_minutes = tuple(files), pickled, hang_minutes

    @property
    def position(self) -> str:
        """Return "step" if a configuration counts steps, else "epoch"."""
        return "step" if self._counts == "steps" else "epoch"

    def length(self, config: Any) -> float:
        """Return how many epochs or steps a run trains; infinity if its configuration does not say."""
        return float(getattr(config, self._counts)) if self._counts else math.inf

    def check_program(self, root: Path) -> None:
        """Accept the files of the program, which are imported, as they are."""

    def check_seeds(self, seeds: int) -> None:
        """Accept any number of seeds."""

    def validate(self, config: Any, ranks: int = 1) -> None:
        """Raise ValueError with key, rule and value if `config` cannot be trained."""
        for key in FIDELITY:
            if hasattr(config, key) and getattr(config, key) < 1:
                raise ValueError(f"{key} must be at least 1; got {getattr(config, key)}")
        if self._validate is not None:
            self._validate(config)

    def identified(self, configs: Sequence[Any]) -> tuple[Sequence[Any], list[str]]:
        """Return `configs` with what identifies their data, and no lines to show."""
        if self._data is None:
            return configs, []
        return [dataclasses.replace(config, **{FINGERPRINT: str(self._data(config))}) for config in configs], []

    def train(self, config: Any, folder: RunFolder, should_stop: Callable[[], bool], claim: int, judge: Judge) -> RunResult | None:
        """Train `config`, and keep its run folder; see `Task.train`."""
        alone = nullcontext(Ranks(0, 1, None))  # type: ignore[arg-type]  # torch is not imported to train without it
        with alone if rank_count() == 1 else joined(Device.auto) as ranks:
            if (ended := broadcast_object(folder.result() if ranks.is_main else None, ranks)) is not None:
                return ended
            run = Run(self, config, folder, ranks, should_stop, judge)
            try:
                if run.begin():
                    try:
                        self._train(config, run)
                    except SystemExit:
                        if not run.leaves():
                            raise
                return run.end(claim)
            except Exception as error:
                raise RunError(run.step, run.seconds, run.seconds / 3600 * devices()) from error
