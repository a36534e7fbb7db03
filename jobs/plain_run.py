"""One attempt at a run of a plain task: what its function `train(config, run)` is given beside the configuration."""

import dataclasses
import itertools
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from cnnjepa.run import checkpoint, progress, refusal
from cnnjepa.run.checkpoint import Checkpoint
from cnnjepa.run.folder import HopelessError, RunFolder, RunResult, RunStatus
from cnnjepa.run.pace import SAVING_SECONDS, Pace
from cnnjepa.run.ranks import Ranks, broadcast_object, gathered
from cnnjepa.run.saver import PATIENCE_AT_END_SECONDS, PATIENCE_AT_STOP_SECONDS, retry
from jobs.task import Judge

log = logging.getLogger("train")
KEEP = 3  # checkpoints of a run
_NOTICE_SECONDS = 2.0  # within which an exit at a signal is seen to follow it: the launcher looks twice a second
_NEVER_SECONDS = 1e9  # a hang is looked for only where the task says what one is


class TrainedTask(Protocol):
    """What a run asks of its task."""

    OBJECTIVE: str
    pickled: bool
    hang_minutes: float

    @property
    def position(self) -> str:
        """Return "step" if a configuration counts steps, else "epoch"."""

    def length(self, config: Any) -> float:
        """Return how many epochs or steps a run trains; infinity if its configuration does not say."""


def devices() -> float:
    """Return how many devices this process was given: CUDA devices, or CPU threads where it has none."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip() not in ("", "-1")]
    threads = os.environ.get("OMP_NUM_THREADS", "")
    return float(len(visible) or (int(threads) if threads.isdigit() else 0) or 1)


class Run:
    """What `train` is given beside its configuration: one attempt at a run, on one rank.

    With several ranks, each of them calls `restore`, `save`, `report` and `should_stop` equally
    often and in the same order. The main rank alone writes.
    """

    def __init__(self, task: TrainedTask, config: Any, folder: RunFolder, ranks: Ranks, stop: Callable[[], bool], judge: Judge) -> None:
        self._task, self._run, self._ranks, self._asked, self._judge = task, folder, ranks, stop, judge
        self._epochs = task.length(config)
        self._before, self._began = progress.read(folder.path, folder.attempt), time.monotonic()
        self._pace = Pace(folder.path, folder.attempt, task.hang_minutes, ranks.is_main and folder.attempt > 0)
        self._pace.begin("training", 60 * task.hang_minutes or _NEVER_SECONDS)
        self.log = log  # its lines go to the run's log/train.log
        self._epoch, self._now = -1, {}  # type: int, dict[str, Any]  # the last report of this attempt
        self._saved = 0  # step of the last checkpoint, restored or saved
        self._last: int | None = None  # the last record of this attempt, None before it has any file of them
        self._checked = False  # whether a state of this attempt was read back
        self._restored = 0  # epoch of the restored state
        self._yielded: int | None = None  # epoch that `epochs` is at
        self.pruned = ""  # why the run ends early
        self.asked_to_stop = False  # whether `train` has seen that it must stop

    @property
    def folder(self) -> Path:
        """Return a folder for the program's own files, which all attempts at the run share."""
        path = self._run.path / "files"
        path.mkdir(parents=True, exist_ok=True)
        return path

    @property
    def rank(self) -> int:
        """Return the number of this process among the run's, 0 for the only one."""
        return self._ranks.rank

    @property
    def ranks(self) -> int:
        """Return the number of processes that train this run together."""
        return self._ranks.count

    @property
    def attempt(self) -> int:
        """Return the number of this attempt at the run, from 1; 0 outside a sweep."""
        return self._run.attempt

    @property
    def should_stop(self) -> bool:
        """Return whether to save and return now: the run is pruned, preempted, or at its time limit. It is cheap."""
        self._pace.step()
        wish = self._wished()
        self.asked_to_stop |= any(gathered(wish, self._ranks)) if self._ranks.count > 1 else wish
        return self.asked_to_stop

    def _wished(self) -> bool:
        return bool(self.pruned) or self._asked()

    def leaves(self) -> bool:
        """Return whether `train`, which exits, was asked to stop, as PyTorch Lightning exits at SIGTERM."""
        end = time.monotonic() + _NOTICE_SECONDS
        while not (wish := self._wished()) and time.monotonic() < end:
            time.sleep(0.05)
        self.asked_to_stop |= wish
        return wish

    def restore(self) -> Any:
        """Return the state that was saved last and is intact, or None if the run begins.

        Its tensors are in host memory.
        """
        found = broadcast_object(self._found() if self._ranks.is_main else None, self._ranks)
        if found is None:
            return None
        import torch

        self._saved = found.step
        state = checkpoint.read(found, torch.device("cpu"), self._task.pickled)
        if self._ranks.is_main:
            self._continue(found.attempt)
            checkpoint.adopt(found, self._run.attempt)
            log.warning("resuming %s from its checkpoint %d", self._run.path.name, found.step)
        self._restored = state["epoch"]
        return state["state"]

    def epochs(self) -> Iterator[int]:
        """Yield the epochs, or steps, that are left after `restore`, counted from 1; end where `should_stop` is true.

        In each of them, call `report` and then `save`, with the state at its end.
        """
        for epoch in itertools.count(self._restored + 1):
            if epoch > self._epochs or self.should_stop:
                return
            self._yielded = epoch
            yield epoch

    def _found(self) -> Checkpoint | None:
        checkpoint.remove_partial(self._run.checkpoints, self._run.attempt)
        return next(checkpoint.intact(self._run.checkpoints, self._run.attempt, set_aside=True), None)

    def _continue(self, source: int | None) -> None:
        """Take over all records of attempt `source`; a report then replaces those from its epoch on."""
        self._run.open_metrics(2**62, source)
        self._last = max((record["step"] for record in self._run.metrics()), default=-1)

    def save(self, state: Any) -> None:
        """Publish `state` as a checkpoint: whole or not at all, with a checksum, beside the two before it.

        Call it after `report`, with all that the run continues from. A full disk does not end the
        run: the state is saved at a later call. Raise TypeError at a state that `restore` would not
        load.
        """
        self._pace.touch()
        if self._yielded is not None and self._epoch != self._yielded:
            raise HopelessError(f"run.save must follow run.report of the same epoch within run.epochs(); got none of {self._yielded}")
        if not self._ranks.is_main:
            return
        step, kept = max(self._epoch, self._saved + 1), {"state": state, "epoch": max(self._epoch, self._restored)}

        def write() -> None:
            self._run.sync()
            found = checkpoint.save(self._run.checkpoints, step, kept, KEEP, self._run.attempt)
            if not self._checked:
                self._require_loads(found)

        try:
            if self.asked_to_stop or self.pruned:
                retry(write, f"the checkpoint at step {step}", PATIENCE_AT_STOP_SECONDS, self._note)
            else:
                write()
                self._note(None)
        except OSError as error:
            self._note(error)
            log.warning("no checkpoint at step %d: %s; training continues", step, error)
            return
        self._saved = step
        self._progress()

    def _note(self, error: OSError | None) -> None:
        refusal.note(self._run.path, self._run.attempt, error)

    def _require_loads(self, saved: Checkpoint) -> None:
        """Read back the first state of an attempt; raise HopelessError if it holds what is not loaded."""
        import torch

        try:
            checkpoint.read(saved, torch.device("cpu"), self._task.pickled)
        except OSError:
            raise
        except Exception as error:  # pickle has no class of its own for it
            saved.path.unlink(missing_ok=True)
            kind = str(error).partition("GLOBAL ")[2].split()[:1] or [" ".join(str(error).split())[:200]]
            rule = "hold tensors, arrays, numbers, texts, and dicts, lists and tuples of these"
            what_to_do = "save its state_dict(), or give PlainTask pickled=True"
            raise HopelessError(f"a saved state must {rule}; got {kind[0]}: {what_to_do}") from error
        self._checked = True

    def report(self, /, epoch: int, **metrics: float) -> bool:
        """Record `metrics` after `epoch`, counted from 1, or after a step; return whether to go on.

        False means what `should_stop` does: save and return. Reports of one epoch are joined. One
        without metrics says how far the run is. 0 is for metrics before training.
        Raise ValueError if the epochs fall, or if a metric is no number.
        """
        if type(epoch) is not int or epoch < max(self._epoch, 0):
            raise ValueError(f"run.report must be given whole epochs or steps that do not fall; got {epoch} after {self._epoch}")
        if taken := {"kind", "step"} & metrics.keys():
            raise ValueError(f"run.report must leave {min(taken)} to the launcher; got a metric of that name")
        if not epoch and not metrics:
            raise ValueError("run.report must be given a metric with 0, at which nothing is trained yet; got none: leave that report out")
        values = {name: _number(name, value) for name, value in metrics.items()}
        self._now = {**(self._now if epoch == self._epoch else {}), **values}
        first, self._epoch = epoch != self._epoch, epoch
        if self._ranks.is_main:
            self._record(first)
            if epoch < self._epochs and not self.pruned:
                self.pruned = self._judge(epoch, {k: v for k, v in self._now.items() if math.isfinite(v)})
        self.pruned = broadcast_object(self.pruned, self._ranks)
        return not self.should_stop

    def _record(self, first: bool) -> None:
        if self._last is None:
            self._run.open_metrics(self._epoch - 1)
        elif first and self._last >= self._epoch:
            self._run.open_metrics(self._epoch - 1, self._run.attempt)
        self._last = self._epoch
        for kind in ("step", "probe"):
            self._run.record(kind, self._epoch, {"epoch": float(self._epoch), **self._now})
        if not self._saved:
            self._progress()

    def _progress(self) -> None:
        """Note how far the run is, for those that save elsewhere, and the time it took."""
        progress.write(self._run.path, self._run.attempt, max(self._epoch, self._saved), self.seconds)

    @property
    def seconds(self) -> float:
        """Return the seconds that the run has taken, over all attempts."""
        return self._before.seconds + time.monotonic() - self._began

    @property
    def step(self) -> int:
        """Return how far the run is: its last epoch, or step, with a report."""
        return max(self._epoch, self._saved, 0)

    def rewind(self) -> None:
        """Allow the next report to be of an epoch that was reported before."""
        self._epoch, self._now = -1, {}

    @property
    def position(self) -> str:
        """Return "step" if the configuration counts steps, else "epoch"."""
        return self._task.position

    @property
    def run_folder(self) -> RunFolder:
        """Return the folder of the run, which the launcher keeps."""
        return self._run

    def begin(self) -> bool:
        """Return whether to train: not if the run was to be pruned at its last report, and killed before that was recorded."""
        if self._ranks.is_main and self._epoch < 0 and (probes := self._run.probes()):
            last = max(probes, key=float)
            if float(last) < self._epochs:
                self.pruned = self._judge(int(float(last)), probes[last])
        self.pruned = broadcast_object(self.pruned, self._ranks)
        return not self.pruned

    def end(self, claim: int) -> RunResult | None:
        """Return the run's result, or None if it was stopped. The main rank writes it."""
        if not self._ranks.is_main:
            return broadcast_object(None, self._ranks)
        ended = self._result(claim)
        if ended is not None:

            def write(result: RunResult = ended) -> None:
                self._run.sync()
                self._run.write_result(result)

            self._pace.begin("saving", SAVING_SECONDS)
            retry(write, "the result", PATIENCE_AT_END_SECONDS, self._note)
            ended = self._run.result() or ended
        self._run.close()
        return broadcast_object(ended, self._ranks)

    def _result(self, claim: int) -> RunResult | None:
        probes = self._run.probes()
        last = max(map(float, probes), default=0.0)
        if not self.pruned and self.asked_to_stop and last < self._epochs:
            return None
        metrics = probes.get(f"{last:g}", {}) if probes and not self.pruned else {}
        objective, missing = self._task.OBJECTIVE, {}
        if not self.pruned and objective not in metrics:
            if objective not in self._now:
                got = ", ".join(metrics) or "nothing"
                raise HopelessError(f"run.report must be given {objective} at the end, by which runs are ranked; got {got}")
            missing[objective] = f"{objective} was {self._now[objective]} at its last report"
        status = RunStatus.pruned if self.pruned else RunStatus.completed
        hours = self.seconds / 3600 * devices() * self._ranks.count
        found = RunResult(status, self.pruned, metrics, missing, probes=probes, step=self.step, seconds=self.seconds)
        return dataclasses.replace(found, device_hours=hours, claim=claim, resumes=max(claim - 1, 0))


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"run.report must be given numbers; got {name}={str(value)[:60]!r}, a {type(value).__name__}") from error
