"""What a long evaluation keeps, so that one that was stopped or killed goes on where it was."""

import hashlib
import io
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cnnjepa.config import TrainConfig
from cnnjepa.run.files import read_json, reading, sealed_json, write_atomic
from cnnjepa.run.folder import EvaluationStopped, never
from cnnjepa.run.identity import identity
from cnnjepa.run.ranks import Ranks, broadcast_object, first_of
from cnnjepa.run.typed import checked
from cnnjepa.weights import digest

log = logging.getLogger(__name__)
SAVE_SECONDS = 60.0  # between two saves of what an evaluation has done


class EvaluationError(RuntimeError):
    """Raised on all ranks alike: an evaluation has no value."""


def nothing() -> None:
    """Tell nobody of progress."""


@dataclass(frozen=True)
class Conditions:
    """Hold where evaluations keep what they have done, whether they should stop, and whom they tell that they go on."""

    folder: Path | None = None  # on the main rank; None keeps nothing
    should_stop: Callable[[], bool] = never
    alive: Callable[[], None] = nothing
    spent: dict[str, float] = field(default_factory=dict)  # evaluation -> seconds in this process, of every encoder


@dataclass
class Kept:
    """Hold the files of one evaluation of one encoder: its state while it runs, then its values.

    Their name depends on all that the values depend on, so that no other run or setting finds them.
    """

    name: str
    settings: Mapping[str, Any]
    conditions: Conditions
    ranks: Ranks
    called: str = field(init=False)
    begun: float = field(init=False, default_factory=time.perf_counter)  # set again where the evaluation begins
    earlier_seconds: float = field(init=False, default=0.0)
    _saved: float = field(init=False, default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        text = json.dumps(self.settings, sort_keys=True)
        self.called = f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    @property
    def seconds(self) -> float:
        """Return the seconds that the evaluation has taken, over all its starts."""
        return self.earlier_seconds + time.perf_counter() - self.begun

    def _file(self, suffix: str) -> Path | None:
        return None if self.conditions.folder is None else self.conditions.folder / f"{self.called}.{suffix}"

    def values(self) -> dict[str, float] | None:
        """Return the values of an evaluation that has ended, on all ranks; None where it has not."""
        found: dict[str, float] | None = None
        if (file := self._file("json")) is not None and self.ranks.is_main and file.exists():
            try:
                with reading(file):
                    found = checked(dict[str, float], read_json(file)["values"], "values")
            except ValueError as error:
                log.warning("%s is computed again: %s", self.name, error)
        return broadcast_object(found, self.ranks)

    def finish(self, values: dict[str, float]) -> None:
        """Keep the values instead of the state. Without room on the disk they are computed again where they are asked for again."""
        file, state = self._file("json"), self._file("pt")
        if not self.ranks.is_main or file is None or state is None:
            return
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(file, sealed_json({"values": values, "settings": self.settings}))
            state.unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s cannot be kept: %s", self.name, error)

    def state(self) -> dict[str, Any] | None:
        """Return the state of an evaluation that was begun, on all ranks; None where there is none."""
        found: dict[str, Any] | None = None
        if (file := self._file("pt")) is not None and self.ranks.is_main and file.exists():
            try:
                found = torch.load(file, map_location="cpu", weights_only=True)
            except Exception as error:  # torch has no class of its own for a damaged file
                log.warning("%s begins again, its state cannot be read: %s", self.name, error)
        found = broadcast_object(found, self.ranks)
        if found is not None:
            self.earlier_seconds = float(found["seconds"])
        return found

    def _save(self, state: dict[str, Any], more: Callable[[], dict[str, Any]], last: bool = False) -> None:
        """Keep the state now and then, or now if `last`. The main rank alone writes."""
        file = self._file("pt")
        if not self.ranks.is_main or file is None or not (last or time.perf_counter() - self._saved > SAVE_SECONDS):
            return
        data = io.BytesIO()
        torch.save({**state, **more(), "seconds": self.seconds}, data)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(file, data.getvalue())
        except OSError as error:  # it goes on, and would begin again after a kill
            log.warning("the state of %s cannot be kept: %s", self.name, error)
        self._saved = time.perf_counter()

    def go_on(self, state: dict[str, Any], more: Callable[[], dict[str, Any]] = dict) -> None:
        """Keep the state now and then, with what `more` returns; raise EvaluationStopped on all ranks where any was asked to stop."""
        self.conditions.alive()
        if first_of("stop" if self.conditions.should_stop() else "", self.ranks):
            self._save(state, more, last=True)
            raise EvaluationStopped(self.name)
        self._save(state, more)


def kept_of(names: Sequence[str], encoder: nn.Module, config: TrainConfig, conditions: Conditions, ranks: Ranks) -> dict[str, Kept]:
    """Return the files of the evaluations `names` of `encoder` under `config`."""
    if not names:
        return {}
    values = identity(config)
    settings = {key: values[key] for key in ("data", "precision", "seed")}
    settings["probes"] = {key: value for key, value in values["probes"].items() if key not in ("names", "data", "every_epochs")}
    # Ranks add up in another order.
    settings |= {"weights": digest(encoder.state_dict()), "ranks": ranks.count, "device": ranks.device.type}
    return {name: Kept(name, settings, conditions, ranks) for name in names}
