"""Order and load the images as a function of (seed, epoch, position).

Resuming or changing the number of ranks therefore does not change the data.
"""

import contextlib
import functools
import logging
import signal
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from cnnjepa.config import TrainConfig, accumulation_steps
from cnnjepa.data.datasets import Images, Indices, Splits
from cnnjepa.data.faults import OR_SKIP, REPAIR, DamagedImagesError, may_pass, raise_alike, shared_memory
from cnnjepa.data.opened import damaged
from cnnjepa.data.pictures import UNREADABLE
from cnnjepa.data.views import ViewSpec, probe_view, random_views
from cnnjepa.data_config import OnBadImage
from cnnjepa.randomness import Stream, generator, integer
from cnnjepa.run.folder import HopelessError
from cnnjepa.run.ranks import Ranks

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """Division of the images into steps.

    An epoch is all whole global batches of a fresh permutation; the remaining images are left out.
    """

    images: int
    global_batch: int
    micro_batch: int
    micro_batches: int  # per rank and step
    epochs: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Return the optimiser steps per epoch."""
        return self.images // self.global_batch

    @property
    def total_steps(self) -> int:
        """Return the optimiser steps of the run."""
        return self.steps_per_epoch * self.epochs

    def positions(self, rank: int, micro_step: int) -> Indices:
        """Return the positions of a micro-batch in the global batch, consecutive on each rank."""
        first = (rank * self.micro_batches + micro_step) * self.micro_batch
        return np.arange(first, first + self.micro_batch)

    def order(self, epoch: int) -> Indices:
        """Return the permutation of the images in `epoch`."""
        return generator(self.seed, Stream.order, epoch).permutation(self.images)


def build_plan(config: TrainConfig, images: int, ranks: int) -> Plan:
    """Return the plan of a run; raise ValueError if one global batch exceeds the images."""
    if images < config.global_batch_size:
        raise ValueError(f"global_batch_size must be at most the {images} training images; got {config.global_batch_size}")
    micro_batches = accumulation_steps(config, ranks)
    return Plan(images, config.global_batch_size, config.micro_batch_size, micro_batches, config.epochs, config.seed)


class _MicroBatches(Sampler[list[tuple[int, int]]]):
    """Yields keys (epoch, index into `pretrain`) of a rank's micro-batches from `first` on."""

    def __init__(self, plan: Plan, rank: int, first: int) -> None:
        self.plan, self.rank, self.first = plan, rank, first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        plan, known, order = self.plan, -1, np.empty(0, np.int64)
        for number in range(self.first, plan.total_steps * plan.micro_batches):
            step, micro_step = divmod(number, plan.micro_batches)
            epoch, step_in_epoch = divmod(step, plan.steps_per_epoch)
            if epoch != known:
                known, order = epoch, plan.order(epoch)
            chosen = order[step_in_epoch * plan.global_batch + plan.positions(self.rank, micro_step)]
            yield [(epoch, int(i)) for i in chosen]


# Views, each uint8 [B, C, S, S], and labels [B].
Loaded = tuple[list[Tensor], Tensor]


def _batch(views: list[Tensor]) -> Tensor:
    """Stack views into uint8 [B, C, S, S], channels last.

    In a loader process the batch is built in shared memory, which saves another copy.
    """
    batch_BHWC: Tensor = default_collate([view.permute(1, 2, 0) for view in views])
    return batch_BHWC.permute(0, 3, 1, 2)


@contextlib.contextmanager
def _naming(images: Images, indices: list[int], remedy: str = "") -> Iterator[None]:
    """Raise an error about bytes that cannot be decoded as one that names the file, with `remedy`."""
    try:
        yield
    except UNREADABLE as error:
        if may_pass(error) or not (found := damaged(images, indices)):
            raise
        raise DamagedImagesError(found[0].line + remedy) from error


class _Views(Dataset[Loaded]):
    """Random views of a micro-batch, one per ViewSpec and image, and its labels.

    The label of an image outside `fit` is -1, so that nothing can be fitted to held-out images.
    """

    def __init__(self, config: TrainConfig, splits: Splits, specs: list[ViewSpec]) -> None:
        self.images, self.pretrain, self.specs = splits.dataset.train, splits.pretrain, specs
        self.seed, self.dct_scaling = config.seed, config.data.dct_scaling
        self.labels = np.where(np.isin(splits.pretrain, splits.fit), splits.dataset.train.labels[splits.pretrain], -1)
        skips = config.data.on_bad_image is OnBadImage.skip  # all could be decoded when the run began
        self.remedy = f": {REPAIR if skips else OR_SKIP}"

    def __getitems__(self, keys: list[tuple[int, int]]) -> Loaded:
        # In shared memory too: where that is full, an error here is seen, and one in the queue is not.
        labels: Tensor = default_collate(list(torch.from_numpy(self.labels[[position for _, position in keys]])))
        if not self.specs:
            return [], labels
        indices = [int(self.pretrain[position]) for _, position in keys]
        views = []
        with _naming(self.images, indices, self.remedy):
            for (epoch, _), index, picture in zip(keys, indices, self.images.pictures(indices)):
                randoms = [generator(self.seed, Stream.view, epoch, index, v) for v in range(len(self.specs))]
                views.append(random_views(self.specs, picture, randoms, self.dct_scaling))
        return [_batch(list(of_spec)) for of_spec in zip(*views)], labels


class _ProbeImages(Dataset[Tensor]):
    """Fixed views of a batch of images."""

    def __init__(self, images: Images, indices: Indices, config: TrainConfig) -> None:
        self.images, self.indices, self.config = images, indices, config

    def __getitems__(self, positions: list[int]) -> Tensor:
        chosen = [int(self.indices[i]) for i in positions]
        with _naming(self.images, chosen):
            return _batch([probe_view(self.config.data, p) for p in self.images.pictures(chosen)])

    def __len__(self) -> int:
        return len(self.indices)


def _as_it_is(batch: T) -> T:
    return batch


def _start_worker(_worker: int) -> None:
    torch.set_num_threads(1)
    # Only the rank handles the signals to save and stop, and it needs its workers until it has
    # saved. SIGTERM must still end a worker.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # blocked in a Ray worker
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _nothing() -> None:
    """Do nothing before processes are forked."""


def _started(loader: DataLoader[T]) -> Iterator[T]:
    """Return the loader's batches, without torch's SIGCHLD handler.

    That handler raises wherever the main thread is, even when it is not waiting for a batch.
    """
    before = signal.getsignal(signal.SIGCHLD)
    batches = iter(loader)
    if signal.getsignal(signal.SIGCHLD) is not before:
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
    return batches


def _tells_of_death(error: Exception) -> bool:
    """Return whether a loader process died, or the connection broke while it handed over a batch."""
    text = str(error)
    died = text.startswith("DataLoader worker (pid") and ("exited unexpectedly" in text or "is killed by signal" in text)
    return isinstance(error, (ConnectionError, EOFError)) or (isinstance(error, RuntimeError) and died)


def _raised_there(error: Exception) -> Exception:
    """Return the error that a loader process raised, without the traceback that torch adds."""
    kind, _, said = str(error).strip().splitlines()[-1].partition(": ")
    return type(error)(said) if isinstance(error, (OSError, HopelessError)) else RuntimeError(f"{kind}: {said}")


def _forget_frames(error: BaseException | None) -> None:
    """Drop torch's frames from an error: they keep the loader until a collection of garbage.

    That would take the queues first, and then wait 5 s for each process.
    """
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def surviving(build: Callable[[int], DataLoader[T]], before_start: Callable[[], None] = _nothing) -> Iterator[T]:
    """Yield the batches of `build(0)` and restart the loader when one of its processes dies.

    `build(n)` must return a loader that starts after the first n batches. `before_start` runs
    before each start of loader processes. Raise SharedMemoryError if they have no room in /dev/shm,
    what a process raised, or torch's error if they die twice without a batch in between.
    """
    delivered, deaths = 0, 0
    while True:
        before_start()
        batches = _started(build(delivered))
        try:
            for batch in batches:
                delivered, deaths = delivered + 1, 0
                yield batch
            return
        except Exception as error:
            deaths += 1
            processes = getattr(batches, "_workers", ())  # none where this process loads
            full = shared_memory(error, len(processes), any(p.exitcode == -signal.SIGBUS for p in processes))
            if processes:
                _forget_frames(error)
            del batches  # ends the other processes
            raised_there = "in DataLoader worker process" in str(error)
            if raised_there or not _tells_of_death(error) or deaths > 1:
                if full:
                    raise full from error
                if raised_there:
                    raise _raised_there(error) from error
                raise
            # Logged as text: a record of the error would keep the other processes alive.
            log.warning("a loader process died (%s); restarting it after %d batches", str(error), delivered)


def blank_batch(splits: Splits, specs: list[ViewSpec], plan: Plan) -> Loaded:
    """Return a micro-batch of black images without labels, with which a rank that has none ends a step."""
    channels = len(splits.dataset.mean)
    views = [torch.zeros((plan.micro_batch, channels, spec.size, spec.size), dtype=torch.uint8) for spec in specs]
    return views, torch.full((plan.micro_batch,), -1)


def train_loader(
    config: TrainConfig,
    splits: Splits,
    specs: list[ViewSpec],
    plan: Plan,
    ranks: Ranks,
    start_step: int,
    before_start: Callable[[], None] = _nothing,
) -> Iterator[Loaded]:
    """Yield this rank's micro-batches from `start_step` on; see `surviving`."""

    def build(delivered: int) -> DataLoader[Loaded]:
        return DataLoader(
            _Views(config, splits, specs),
            batch_sampler=_MicroBatches(plan, ranks.rank, start_step * plan.micro_batches + delivered),
            num_workers=config.data.workers,
            collate_fn=_as_it_is,
            pin_memory=ranks.device.type == "cuda",
            worker_init_fn=_start_worker,
            # Drawing the unused base seed of workers would change the global generator's state.
            generator=torch.Generator().manual_seed(integer(config.seed, Stream.order)),
        )

    return surviving(build, before_start)


class MicroBatches:
    """A rank's micro-batches. After an error of its loader it gets black ones, until all ranks raise that error.

    A rank that ended in the middle of a step would leave the others waiting for it, or with no more
    than the news that it is gone. One rank alone raises at once.
    """

    def __init__(self, batches: Iterator[Loaded], blank: Loaded, ranks: Ranks) -> None:
        self._batches, self._blank, self._ranks = batches, blank, ranks
        self._fault: Exception | None = None

    @property
    def failed(self) -> bool:
        """Return whether this rank's loader has failed; at the end of a step all ranks are told."""
        return self._fault is not None

    def __iter__(self) -> Iterator[Loaded]:
        return self

    def __next__(self) -> Loaded:
        """Return the next micro-batch, or a black one."""
        try:
            if self._fault is None:
                return next(self._batches)
        except Exception as error:
            if self._ranks.count == 1:
                raise
            log.error("rank %d could not load its images: %s", self._ranks.rank, traceback.format_exc())
            self._fault = error
        return self._blank

    def raise_fault(self) -> None:
        """Raise the error of the rank that has one, on all ranks; call this on all of them."""
        raise_alike(self._fault, self._ranks)


def probe_loader(config: TrainConfig, images: Images, indices: Indices, device: torch.device) -> Iterator[Tensor]:
    """Yield the fixed views of `indices` in order, uint8 [B, C, S, S]; see `surviving`."""
    size = config.probes.feature_batch_size

    def build(delivered: int) -> DataLoader[Tensor]:
        return DataLoader(
            _ProbeImages(images, indices[delivered * size :], config),
            size,
            num_workers=config.data.workers,
            collate_fn=_as_it_is,
            pin_memory=device.type == "cuda",
            worker_init_fn=_start_worker,
        )

    return surviving(build)


@functools.cache
def _per_channel(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return `values` as [C, 1, 1] on the device, copied there once."""
    return torch.tensor(values, dtype=dtype, device=device)[:, None, None]


def normalise(pixels_BCHW: Tensor, splits: Splits, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Convert uint8 pixels on the host to normalised channels-last values on `device`."""
    pixels = pixels_BCHW.to(device, non_blocking=True).to(dtype, memory_format=torch.channels_last)
    mean, std = (_per_channel(tuple(values), device, dtype) for values in (splits.dataset.mean, splits.dataset.std))
    return (pixels / 255 - mean) / std
