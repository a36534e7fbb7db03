"""The order of the images and their loading: functions of (seed, epoch, position), so that resumes and ranks change nothing."""

import functools
import logging
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from cnnjepa.config import TrainConfig, accumulation_steps
from cnnjepa.data.datasets import Images, Indices, Splits
from cnnjepa.data.views import ViewSpec, probe_view, random_views
from cnnjepa.distributed import Ranks
from cnnjepa.randomness import Stream, generator, integer

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """How images become steps: an epoch is all whole global batches of a fresh permutation; what is left over waits for the next."""

    images: int
    global_batch: int
    micro_batch: int
    micro_batches: int  # a rank and step
    epochs: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps an epoch."""
        return self.images // self.global_batch

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the run."""
        return self.steps_per_epoch * self.epochs

    def positions(self, rank: int, micro_step: int) -> Indices:
        """Where a rank's micro-batch stands in the global batch: ranks take consecutive runs of micro-batches."""
        first = (rank * self.micro_batches + micro_step) * self.micro_batch
        return np.arange(first, first + self.micro_batch)

    def order(self, epoch: int) -> Indices:
        """The permutation of the images in `epoch`."""
        return generator(self.seed, Stream.order, epoch).permutation(self.images)


def build_plan(config: TrainConfig, images: int, ranks: int) -> Plan:
    """The plan of a run; raises ValueError where one global batch needs more images than there are."""
    if images < config.global_batch_size:
        raise ValueError(f"global_batch_size must be at most the {images} training images; got {config.global_batch_size}")
    micro_batches = accumulation_steps(config, ranks)
    return Plan(images, config.global_batch_size, config.micro_batch_size, micro_batches, config.epochs, config.seed)


class _MicroBatches(Sampler[list[tuple[int, int]]]):
    """Keys (epoch, index into `pretrain`) of one rank's micro-batches, from its `first` one to the end of the run."""

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


# Views, each uint8 [B, 3, S, S], and labels [B].
Loaded = tuple[list[Tensor], Tensor]


def _batch(views: list[Tensor]) -> Tensor:
    """uint8 [B, 3, S, S], channels last; in a loader process put together in shared memory, so that it is not copied again."""
    batch_BHW3: Tensor = default_collate([view.permute(1, 2, 0) for view in views])
    return batch_BHW3.permute(0, 3, 1, 2)


class _Views(Dataset[Loaded]):
    """Random views of a micro-batch, one a ViewSpec, each image decoded once, or not at all where no view is asked for; and its labels.

    The label of an image that is not in `fit` is -1: nothing can be fitted to what choices are made on.
    """

    def __init__(self, config: TrainConfig, splits: Splits, specs: list[ViewSpec]) -> None:
        self.images, self.pretrain, self.specs = splits.dataset.train, splits.pretrain, specs
        self.seed, self.dct_scaling = config.seed, config.data.dct_scaling
        self.labels = np.where(np.isin(splits.pretrain, splits.fit), splits.dataset.train.labels[splits.pretrain], -1)

    def __getitems__(self, keys: list[tuple[int, int]]) -> Loaded:
        labels = torch.from_numpy(self.labels[[position for _, position in keys]])
        if not self.specs:
            return [], labels
        indices = [int(self.pretrain[position]) for _, position in keys]
        views = []
        for (epoch, _), index, picture in zip(keys, indices, self.images.pictures(indices)):
            randoms = [generator(self.seed, Stream.view, epoch, index, v) for v in range(len(self.specs))]
            views.append(random_views(self.specs, picture, randoms, self.dct_scaling))
        return [_batch(list(of_spec)) for of_spec in zip(*views)], labels


class _ProbeImages(Dataset[Tensor]):
    """Fixed views of a batch of images."""

    def __init__(self, images: Images, indices: Indices, config: TrainConfig) -> None:
        self.images, self.indices, self.config = images, indices, config

    def __getitems__(self, positions: list[int]) -> Tensor:
        return _batch([probe_view(self.config.data, p) for p in self.images.pictures([int(self.indices[i]) for i in positions])])

    def __len__(self) -> int:
        return len(self.indices)


def _as_it_is(batch: T) -> T:
    return batch


def _start_worker(_worker: int) -> None:
    torch.set_num_threads(1)
    # The signals that ask a run to save and stop are for the rank, which needs its workers until it has; SIGTERM must end a worker.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # a slot in Ray runs with it blocked
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _nothing() -> None:
    """Nothing has to be done before processes are forked."""


def _started(loader: DataLoader[T]) -> Iterator[T]:
    """The loader's batches, without torch's handler of SIGCHLD: it raises wherever the main thread is, also where no batch is awaited."""
    before = signal.getsignal(signal.SIGCHLD)
    batches = iter(loader)
    if signal.getsignal(signal.SIGCHLD) is not before:
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
    return batches


def _tells_of_death(error: Exception) -> bool:
    """Whether a loader's process is gone; an error within a process keeps its type, and says that it comes from there."""
    text = str(error)
    if isinstance(error, RuntimeError):
        return text.startswith("DataLoader worker (pid") and ("exited unexpectedly" in text or "is killed by signal" in text)
    return "in DataLoader worker process" not in text  # the connection broke while it handed a batch over


def surviving(build: Callable[[int], DataLoader[T]], before_start: Callable[[], None] = _nothing) -> Iterator[T]:
    """The batches of `build(0)`; where one of its processes dies (as by the OOM killer) those of `build(n)` follow the first n.

    Raises what torch says of it where processes die twice without a batch in between. `before_start` is called whenever processes are to
    start.
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
        except (RuntimeError, ConnectionError, EOFError) as error:
            deaths += 1
            if not _tells_of_death(error) or deaths > 1:
                raise
            # As text: with the error a log record would keep the other processes.
            log.warning("a loader process has died (%s), it is started again after %d batches", str(error), delivered)
        del batches  # ends the others


def train_loader(
    config: TrainConfig,
    splits: Splits,
    specs: list[ViewSpec],
    plan: Plan,
    ranks: Ranks,
    start_step: int,
    before_start: Callable[[], None] = _nothing,
) -> Iterator[Loaded]:
    """This rank's micro-batches from `start_step` on; see `surviving`."""

    def build(delivered: int) -> DataLoader[Loaded]:
        return DataLoader(
            _Views(config, splits, specs),
            batch_sampler=_MicroBatches(plan, ranks.rank, start_step * plan.micro_batches + delivered),
            num_workers=config.data.workers,
            collate_fn=_as_it_is,
            pin_memory=ranks.device.type == "cuda",
            worker_init_fn=_start_worker,
            # Workers' base seed is of no use here, but drawing it from the global generator would disturb that.
            generator=torch.Generator().manual_seed(integer(config.seed, Stream.order)),
        )

    return surviving(build, before_start)


def probe_loader(config: TrainConfig, images: Images, indices: Indices, device: torch.device) -> Iterator[Tensor]:
    """Fixed views of `indices` in order, uint8 [B, 3, S, S]; see `surviving`."""
    size = config.probes.batch_size

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
    """[C, 1, 1] on the device, sent there once."""
    return torch.tensor(values, dtype=dtype, device=device)[:, None, None]


def normalise(pixels_BCHW: Tensor, splits: Splits, device: torch.device, dtype: torch.dtype) -> Tensor:
    """uint8 pixels on the host to normalised channels-last values on `device`."""
    pixels = pixels_BCHW.to(device, non_blocking=True).to(dtype, memory_format=torch.channels_last)
    mean, std = (_per_channel(tuple(values), device, dtype) for values in (splits.dataset.mean, splits.dataset.std))
    return (pixels / 255 - mean) / std
