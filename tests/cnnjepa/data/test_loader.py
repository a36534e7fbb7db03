"""A loader's stream is the same for any workers, ranks and start, and goes on where one of its processes dies."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cnnjepa.config import AugmentConfig, TrainConfig
from cnnjepa.data.datasets import load_splits
from cnnjepa.data.loader import build_plan, probe_loader, surviving, train_loader
from cnnjepa.data.views import augmented, crop_and_flip, probe_view, random_views
from cnnjepa.data_config import DataConfig, DatasetName
from cnnjepa.randomness import Stream, generator
from cnnjepa.run.ranks import Ranks
from tests.cnnjepa.data.test_data import CPU
from tests.support.images import image_tree
from tests.support.tiny import tiny_config


def image_files(folder: Path) -> TrainConfig:
    """164 JPEGs of two classes; 5 steps of 32 images an epoch."""
    config = tiny_config(micro_batch_size=8)
    root = image_tree(folder, ["cat", "dog"], images=82)
    config.data = DataConfig(DatasetName.imagefolder, str(root))
    return config


def stream(
    config: TrainConfig, views: int = 1, workers: int = 0, ranks: int = 1, start: int = 0, stop: int | None = None
) -> list[list[torch.Tensor]]:
    """Steps `start` to `stop`, each the views and labels of all ranks in the order of the global batch."""
    config.data.workers = workers
    splits = load_splits(config.data)
    plan = build_plan(config, len(splits.pretrain), ranks)
    specs = [crop_and_flip(config.data)] if views == 1 else [augmented(config.data, AugmentConfig())] * views
    loaders = [train_loader(config, splits, specs, plan, Ranks(r, ranks, CPU), start) for r in range(ranks)]
    steps = []
    for _ in range(start, plan.total_steps if stop is None else stop):
        loaded = [next(loader) for loader in loaders for _ in range(plan.micro_batches)]
        steps.append([torch.cat(parts) for parts in zip(*([*v, labels] for v, labels in loaded), strict=True)])
    assert (next(loaders[0], None) is None) == (stop is None)
    return steps


def same(some: list[list[torch.Tensor]], others: list[list[torch.Tensor]]) -> bool:
    pairs = [pair for one, other in zip(some, others, strict=True) for pair in zip(one, other, strict=True)]
    return bool(pairs) and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "views"), [("digits", 1), ("image files", 2)])
def test_the_stream_is_the_same_for_any_workers_ranks_and_start(tmp_path: Path, name: str, views: int) -> None:
    """Pixels and labels, for one view, and for two that go through every augmentation; three epochs."""
    config = image_files(tmp_path) if name == "image files" else tiny_config(micro_batch_size=8)
    config.epochs = 3
    whole = stream(config, views)
    assert len(whole) == 15
    assert [tuple(part.shape) for part in whole[0]] == [(32, 3, 32, 32)] * views + [(32,)]
    for workers, ranks in ((2, 1), (8, 1), (0, 2), (0, 4), (2, 4)):
        assert same(whole, stream(config, views, workers, ranks)), (workers, ranks)
    # Taken up in the middle of the first and of the second epoch, by other processes and ranks than before.
    for start, workers, ranks in ((2, 2, 1), (7, 8, 1), (7, 0, 4), (13, 2, 2)):
        assert same(whole[start:], stream(config, views, workers, ranks, start)), (start, workers, ranks)
    assert same(whole[3:6], stream(config, views, 2, start=3, stop=6))  # over the end of an epoch, and left in the middle of the next
    # Another order and other crops in every epoch, other crops in each view, and with another seed other ones.
    assert not any(torch.equal(whole[a][0], whole[b][0]) for a, b in ((0, 5), (5, 10), (0, 1)))
    assert views == 1 or not torch.equal(whole[0][0], whole[0][1])
    config.seed += 1
    assert not same(whole[:1], stream(config, views, stop=1))


def test_a_view_is_a_function_of_seed_epoch_and_image() -> None:
    """Not of its place in the batch, nor of the batch's size: the same image has the same pixels in any batch of its epoch."""
    config = tiny_config(micro_batch_size=8, epochs=1)
    seen = []
    for global_batch in (32, 8):
        config.global_batch_size = global_batch
        splits = load_splits(config.data)
        plan = build_plan(config, len(splits.pretrain), 1)
        (views, _), first = next(train_loader(config, splits, [crop_and_flip(config.data)], plan, Ranks(0, 1, CPU), 0)), plan.order(0)[:8]
        seen.append(dict(zip(first.tolist(), views[0], strict=True)))
    assert seen[0].keys() == seen[1].keys()
    assert all(torch.equal(seen[0][i], seen[1][i]) for i in seen[0])
    index = int(splits.pretrain[first[3]])
    (picture,) = splits.dataset.train.pictures([index])
    (view,) = random_views([crop_and_flip(config.data)], picture, [generator(config.seed, Stream.view, 0, index, 0)])
    assert torch.equal(seen[0][int(first[3])], view)


def test_an_epoch_shows_each_image_at_most_once() -> None:
    plan = build_plan(tiny_config(), 100, 1)
    assert plan.steps_per_epoch == 3
    assert sorted(plan.order(0)) == list(range(100))
    assert (plan.order(0) != plan.order(1)).any()


def test_too_few_images_for_one_batch_is_said() -> None:
    with pytest.raises(ValueError, match="global_batch_size must be at most the 20 training images; got 32"):
        build_plan(tiny_config(), 20, 1)


GONE = "DataLoader worker (pid 7) is killed by signal: Killed. "


def dying(ends: list[int], error: Exception, asked: list[int]) -> Callable[[int], Any]:
    """Loaders of the numbers 0 to 9, each of which begins where it is asked to, and the next of which dies when it comes to its end."""
    remaining = iter([*ends, 10])

    def build(delivered: int) -> Iterator[int]:
        asked.append(delivered)
        end = next(remaining)

        def numbers() -> Iterator[int]:
            yield from range(delivered, end)
            if end < 10:
                raise error

        return numbers()

    return build


def test_a_loader_whose_process_dies_goes_on_behind_what_it_delivered(caplog: pytest.LogCaptureFixture) -> None:
    asked: list[int] = []
    starts: list[int] = []
    for error in (RuntimeError(GONE), ConnectionResetError("Connection reset by peer"), EOFError()):
        asked.clear()
        starts.clear()
        found = list(surviving(dying([3, 4, 8], error, asked), lambda: starts.append(len(starts))))  # type: ignore[arg-type]
        assert found == list(range(10))
        assert asked == [0, 3, 4, 8]
        assert len(starts) == 4, "whatever must not be forked is settled before each start"
    assert "restarting it after 3 batches" in caplog.text


def test_a_loader_that_dies_twice_at_one_place_or_fails_by_itself_ends_the_run() -> None:
    asked: list[int] = []
    batches = surviving(dying([5, 5], RuntimeError(GONE), asked))  # type: ignore[arg-type]
    assert [next(batches) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(RuntimeError, match="is killed by signal"):
        next(batches)
    assert asked == [0, 5]
    within = "Caught ConnectionError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  x\n"
    for error, said in (
        (RuntimeError("image file is truncated"), "image file is truncated"),
        (ConnectionError(f"{within}ConnectionError: of its own: y"), "of its own: y"),
        (RuntimeError(f"{within}ZeroDivisionError: by zero"), "ZeroDivisionError: by zero"),
    ):
        asked.clear()
        with pytest.raises((RuntimeError, OSError), match=f"^{said}$"):
            list(surviving(dying([2], error, asked)))  # type: ignore[arg-type]
        assert asked == [0]


def test_a_probes_loader_that_is_started_again_shows_the_images_that_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config()
    config.probes.feature_batch_size = 8
    splits = load_splits(config.data)
    monkeypatch.setattr("cnnjepa.data.loader.surviving", lambda build: (list(build(0)), list(build(2))))
    whole, rest = probe_loader(config, splits.dataset.test, splits.test, CPU)  # type: ignore[misc]
    assert [len(batch) for batch in whole] == [8] * 7 + [4]
    assert torch.equal(torch.cat(list(whole))[16:], torch.cat(list(rest)))
    expected = [probe_view(config.data, p) for p in splits.dataset.test.pictures(splits.test.tolist())]
    assert torch.equal(torch.cat(list(whole)), torch.stack(expected))
