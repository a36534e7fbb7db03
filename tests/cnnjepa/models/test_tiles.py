"""Tiled execution comes to what masked execution comes to, in float64, on every network, mask and kernel."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cnnjepa.batch import Batch
from cnnjepa.config import EncoderConfig, EncoderName, Execution, PredictorConfig, TrainConfig
from cnnjepa.data_config import DataConfig
from cnnjepa.mask_config import MaskConfig, MaskStrategy
from cnnjepa.masking import draw_visible
from cnnjepa.methods.cnn_jepa import Config, Method
from cnnjepa.models import resnet, tile_map, tiles
from cnnjepa.models.encoders import build_encoder as build_any
from cnnjepa.models.masked import Visibility
from cnnjepa.models.resnet import ResNet, build_encoder
from cnnjepa.models.tiles import Kernels, encode_tiles
from cnnjepa.optim import build_optimizer
from tests.cnnjepa.models.test_models import lively
from tests.support.sample import sampled

NETWORKS = [EncoderName.resnet_small, EncoderName.resnet18]
TOLERANCE = 1e-9  # of the largest value of each tensor


def drawn(strategy: MaskStrategy, grid: int, batch: int = 4) -> Tensor:
    return torch.from_numpy(draw_visible(MaskConfig(strategy), grid, 3, 1, np.arange(batch)))


def cells(*chosen: tuple[int, int, int], shape: tuple[int, int, int]) -> Tensor:
    visible = torch.zeros(shape, dtype=torch.bool)
    for cell in chosen:
        visible[cell] = True
    return visible


MASKS: dict[str, Callable[[], Tensor]] = {
    "multi_block": lambda: drawn(MaskStrategy.multi_block, 3),
    "random": lambda: drawn(MaskStrategy.random, 4, 3),
    "one_cell_each": lambda: cells((0, 2, 0), (1, 1, 1), (2, 0, 0), (3, 1, 2), (4, 2, 2), (5, 0, 1), shape=(6, 3, 3)),
    "one_image_sees_nothing": lambda: cells((0, 0, 0), (0, 0, 1), (2, 2, 2), shape=(3, 3, 3)),
    "all_but_one": lambda: ~cells((1, 0, 2), shape=(2, 3, 3)),
    "unequal_counts": lambda: (
        torch.rand(4, 5, 5, generator=torch.Generator().manual_seed(1)) < torch.tensor([0.1, 0.4, 0.7, 1])[:, None, None]
    ),
    "batch_of_one": lambda: torch.rand(1, 5, 5, generator=torch.Generator().manual_seed(2)) < 0.5,
    "wide": lambda: torch.rand(2, 2, 5, generator=torch.Generator().manual_seed(3)) < 0.5,
}


KERNELS = {
    "windows": Kernels(product=0),
    "taps": Kernels(64, taps=(64, 64)),
    "patches": Kernels(64, patches=64, weight_patches=64),
    "mixed": Kernels(0, (0, 2), 1, 4),
    "cuda": tiles.CUDA,
}


def with_each(names: Iterable[str]) -> list[Any]:
    """Each network with each of these names; of the large network's a sample, but for the night."""
    large = [pytest.param(EncoderName.resnet50, name, marks=pytest.mark.slow, id=f"resnet50-{name}") for name in names]
    return [*(pytest.param(n, name, id=f"{n.name}-{name}") for n in NETWORKS for name in names), *sampled(large, 2, "tiles of ResNet-50")]


def larger(*sizes: tuple[EncoderName, int]) -> list[Any]:
    """Networks that take long, with their image sizes: one of them, but for the night."""
    return sampled([pytest.param(name, size, marks=pytest.mark.slow, id=name.name) for name, size in sizes], 1, "large tiles")


def assert_close(a: Tensor, b: Tensor, what: str, at_least: float = 0) -> None:
    largest = max(b.abs().max().item(), at_least)
    assert (a - b).abs().max().item() <= TOLERANCE * largest, what


def assert_same_pass(tiled: ResNet, visible: Tensor, training: bool = True) -> None:
    """Features, gradients of all parameters, and buffers."""
    tiled = lively(tiled).train(training)  # type: ignore[assignment]
    masked = copy.deepcopy(tiled)
    masked.execution = Execution.masked
    b, h, w = visible.shape
    channels = next(m for m in tiled.modules() if isinstance(m, nn.Conv2d)).in_channels
    images = torch.randn(b, channels, h * tiled.cell, w * tiled.cell, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    features, expected = (net(images, Visibility(visible)) for net in (tiled, masked))
    assert_close(features, expected, "features")
    assert not features[(~visible)[:, None].expand_as(features)].any()
    seen_by_loss = torch.randn(features.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    for out in (features, expected):
        (out * seen_by_loss).sum().backward()
    # Some gradients are sums that cancel: what shifts all positions of a channel alike is taken away by the next BatchNorm.
    cancelled = 1e-3 * max(p.grad.abs().max().item() for p in masked.parameters() if p.grad is not None)
    for (name, p), q in zip(tiled.named_parameters(), masked.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert q.grad.any(), name
        assert_close(p.grad, q.grad, name, cancelled)
    for (name, a), c in zip(tiled.named_buffers(), masked.buffers(), strict=True):
        assert_close(a.double(), c.double(), name)


@pytest.mark.parametrize(("name", "mask"), with_each(MASKS))
def test_tiles_equal_masked_execution(name: EncoderName, mask: str) -> None:
    assert_same_pass(build_encoder(EncoderConfig(name, width=8, blocks=2)), MASKS[mask]())


def stages_of(net: nn.Module, visible: Tensor, readers: list[bool]) -> tuple[list[Tensor], dict[str, Tensor], list[Tensor]]:
    """Features of all stages, gradients of all parameters, and buffers, of a loss that reads the stages marked in `readers`."""
    net = copy.deepcopy(net)
    b, h, w = visible.shape
    images = torch.randn(b, 3, h * net.cell, w * net.cell, dtype=torch.float64, generator=torch.Generator().manual_seed(0))  # type: ignore[operator]
    stages = net.stage_features(images, Visibility(visible))  # type: ignore[operator]
    loss = torch.zeros((), dtype=torch.float64)
    for i, (stage, is_read) in enumerate(zip(stages, readers, strict=True)):
        if is_read:
            weights = torch.randn(stage.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
            loss = loss + (stage * weights).sum() + (stage * weights).square().sum()  # two readers of one tensor
    loss.backward()
    gradients = {k: p.grad for k, p in net.named_parameters() if p.grad is not None}
    return stages, gradients, [c.double() for c in net.buffers()]


# The stages that a loss reads, counted from the last.
READ_STAGES = {"all": {0, 1, 2, 3}, "last": {0}, "inner": {1}, "two": {0, 2}, "first": {2, 3}}


@pytest.mark.parametrize("read", READ_STAGES)
@pytest.mark.parametrize(("name", "mask"), [(n, m) for n in NETWORKS for m in ("random", "one_image_sees_nothing", "unequal_counts")])
def test_the_features_of_all_stages_equal_masked_executions(name: EncoderName, mask: str, read: str) -> None:
    """With their gradients, whichever stages a loss reads: a gradient may reach a stage from the next one and from the loss."""
    net = lively(build_encoder(EncoderConfig(name, width=8, blocks=2)))
    masked = copy.deepcopy(net)
    masked.execution = Execution.masked
    visible, readers = MASKS[mask](), [i in READ_STAGES[read] for i in reversed(range(len(net.stages())))]
    (stages, gradients, buffers), (others, expected, theirs) = (stages_of(n, visible, readers) for n in (net, masked))
    per_cell = [s.shape[-1] // visible.shape[-1] for s in stages]
    assert per_cell == ([4, 2, 1] if net.small else [8, 4, 2, 1])
    assert [s.shape[1] for s in stages] == net.stage_channels
    for i, (a, c) in enumerate(zip(stages, others, strict=True)):
        assert_close(a, c, f"stage {i}")
        assert not a[(Visibility(visible).at(a) == 0).expand_as(a)].any()
    assert gradients.keys() == expected.keys()
    cancelled = 1e-3 * max(g.abs().max().item() for g in expected.values())
    for key, gradient in expected.items():
        assert_close(gradients[key], gradient, key, cancelled)
    for a, c in zip(buffers, theirs, strict=True):
        assert_close(a, c, "buffers")


@pytest.mark.parametrize("name", NETWORKS)
def test_the_last_stage_is_the_features_bit_for_bit(name: EncoderName) -> None:
    net = lively(build_encoder(EncoderConfig(name, width=8)))
    visible = Visibility(MASKS["random"]())
    images = torch.randn(3, 3, 4 * net.cell, 4 * net.cell, dtype=torch.float64)  # type: ignore[operator]
    for given in (visible, None):
        whole, staged = copy.deepcopy(net), copy.deepcopy(net)
        assert torch.equal(staged.stage_features(images, given)[-1], whole(images, given))  # type: ignore[operator]


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
@pytest.mark.parametrize("name", NETWORKS)
def test_tiles_of_any_number_of_channels_equal_masked_execution(name: EncoderName, channels: int) -> None:
    assert_same_pass(build_encoder(EncoderConfig(name, width=8), channels=channels), MASKS["random"]())


@pytest.mark.slow
def test_a_convnext_computes_the_same_from_visible_rows() -> None:
    encoder = build_any(EncoderConfig(EncoderName.convnext_tiny), 96, 0)
    assert_same_pass(encoder, MASKS["one_image_sees_nothing"]())
    shapes = []
    encoder.stages[0].blocks[0].mlp["fc1"].register_forward_hook(lambda m, given, out: shapes.append(given[0].shape))  # type: ignore[union-attr, index]
    encoder(torch.randn(3, 3, 96, 96, dtype=torch.float64), Visibility(MASKS["one_image_sees_nothing"]()))
    assert shapes == [(3 * 8 * 8, 96)]


@pytest.mark.parametrize(("name", "grid"), larger((EncoderName.resnet34, 3), (EncoderName.resnet101, 3), (EncoderName.wide_resnet50_2, 3)))
def test_the_deeper_and_wider_ones_too(name: EncoderName, grid: int) -> None:
    assert_same_pass(build_encoder(EncoderConfig(name)), drawn(MaskStrategy.multi_block, grid))


def test_all_cells_visible_is_the_dense_network() -> None:
    net = lively(build_encoder(EncoderConfig(EncoderName.resnet18)))
    images = torch.randn(2, 3, 96, 96, dtype=torch.float64)
    assert torch.equal(copy.deepcopy(net)(images, Visibility(torch.ones(2, 3, 3).bool())), net(images))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kernels"), with_each(KERNELS))
def test_every_kernel_computes_the_same(kernels: str, name: EncoderName, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiles.CPU, torch.float64, KERNELS[kernels])
    assert_same_pass(build_encoder(EncoderConfig(name, width=8)), MASKS["unequal_counts"]())


@pytest.mark.slow
@pytest.mark.parametrize("kernels", [Kernels(0), tiles.CUDA], ids=["windows", "cuda"])
@pytest.mark.parametrize("mask", MASKS)
def test_tiles_that_see_nothing_may_be_added(mask: str, kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiles.CPU, torch.float64, kernels)
    monkeypatch.setitem(tile_map.SHAPES, "cpu", 3)
    visible = MASKS[mask]()
    assert tile_map.TileMap(Visibility(visible)).padding == -int(visible.sum()) % -(-visible.numel() // 3)
    for name in (EncoderName.resnet_small, EncoderName.resnet18):
        assert_same_pass(build_encoder(EncoderConfig(name, width=8, blocks=2)), visible)


def test_on_a_device_where_few_tiles_do_not_pay_they_are_taken_from_enough_cells_on(monkeypatch: pytest.MonkeyPatch) -> None:
    net, passes = build_encoder(EncoderConfig(width=8)), []
    monkeypatch.setattr(resnet, "encode_tiles", lambda *given: passes.append("tiled") or encode_tiles(*given))
    monkeypatch.setitem(resnet.FEWEST_CELLS, "cpu", 32)
    for images in (1, 2):
        net(torch.randn(images, 3, 32, 32), Visibility(MASKS["random"]()[:images]))
        assert len(passes) == images - 1


def test_evaluation_under_a_mask_is_the_same() -> None:
    assert_same_pass(build_encoder(EncoderConfig(width=8)), MASKS["random"](), training=False)


def test_two_tiled_passes_may_be_open_at_once() -> None:
    net = lively(build_encoder(EncoderConfig(width=8)))
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    masks = [Visibility(MASKS["random"]()), Visibility(~MASKS["random"]())]

    def gradients(*losses: Callable[[], Tensor]) -> list[Tensor]:
        net.zero_grad()
        torch.stack([loss() for loss in losses]).sum().backward()
        return [p.grad for p in net.parameters() if p.grad is not None]

    one, two = (lambda m=m: net(images, m).square().sum() for m in masks)
    for both, a, b in zip(gradients(one, two), gradients(one), gradients(two), strict=True):
        torch.testing.assert_close(both, a + b)


def test_a_gradient_that_others_hold_is_left_alone() -> None:
    net = lively(build_encoder(EncoderConfig(width=8)))
    features = net(torch.randn(3, 3, 32, 32, dtype=torch.float64), Visibility(MASKS["random"]()))
    gradient = torch.randn_like(features)
    before = gradient.clone()
    features.backward(gradient)
    assert torch.equal(gradient, before)


def test_the_gradient_of_what_the_blocks_hand_on_is_left_alone_too() -> None:
    """What `encode_tiles` puts behind the blocks copies its gradient in any case; others may not."""
    net, visible = lively(build_encoder(EncoderConfig(width=8))), MASKS["random"]()
    rows_of, blocks = tile_map.TileMap(Visibility(visible)), net.blocks()
    rows = torch.rand(rows_of.count * 4**2, blocks[0].conv1.in_channels, dtype=torch.float64, requires_grad=True)
    features, _ = tiles.run_blocks(blocks, rows, rows_of, 4)
    gradient = torch.randn_like(features)
    before = gradient.clone()
    features.backward(gradient)
    assert torch.equal(gradient, before)


def test_a_single_visible_position_is_refused_as_masked_execution_does() -> None:
    for execution in Execution:
        net = build_encoder(EncoderConfig(width=8, execution=execution))
        with pytest.raises(ValueError, match="more than 1 v"):
            net(torch.randn(1, 3, 32, 32), Visibility(cells((0, 1, 1), shape=(1, 4, 4))))


def trained(execution: Execution, encoder: EncoderName, size: int) -> tuple[nn.Module, list[float]]:
    config = TrainConfig(
        method=Config(predictor=PredictorConfig(depth=1)),
        encoder=EncoderConfig(encoder, width=8, execution=execution),
        data=DataConfig(image_size=size),
        seed=7,
    )
    method = Method(config, total_steps=10).double().train()
    parameters = [p for p in method.parameters() if p.requires_grad]
    optimizer = build_optimizer(config.optimizer, parameters)
    losses = []
    for step in range(10):
        images = torch.randn(4, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(step % 2))
        optimizer.zero_grad()
        loss = method(Batch([images], step, np.arange(4)))["loss"]
        loss.backward()
        optimizer.step()
        method.after_step(step)
        losses.append(loss.item())
    return method, losses


@pytest.mark.parametrize(
    ("encoder", "size"),
    [
        pytest.param(EncoderName.resnet_small, 40, id="resnet_small"),
        *larger((EncoderName.resnet18, 96), (EncoderName.resnet34, 96), (EncoderName.resnet50, 96), (EncoderName.resnet101, 96)),
    ],
)
def test_ten_steps_of_training_are_the_same(encoder: EncoderName, size: int) -> None:
    (tiled, losses), (masked, expected) = (trained(e, encoder, size) for e in Execution)
    assert losses == pytest.approx(expected, rel=TOLERANCE, abs=0)
    assert losses[-1] < losses[0]
    for (name, a), b in zip(tiled.state_dict().items(), masked.state_dict().values(), strict=True):
        # A bias before BatchNorm has no gradient but rounding, which AdamW blows up to whole steps: it moves nothing else.
        if not (name.startswith("predictor") and name.endswith("bias") and name.split(".")[1] in {"0", "1"}):
            assert_close(a.double(), b.double(), name)


def test_bf16_tiles_stay_as_near_to_float64_as_masked_execution_does() -> None:
    exact = lively(build_encoder(EncoderConfig(EncoderName.resnet18)))
    images = torch.randn(4, 3, 96, 96, dtype=torch.float64)
    visibility = Visibility(MASKS["multi_block"]())
    errors = {}
    truth = copy.deepcopy(exact)(images, visibility)
    for execution in Execution:
        net = copy.deepcopy(exact).float().to(memory_format=torch.channels_last)
        net.execution = execution  # type: ignore[assignment]
        with torch.autocast("cpu", torch.bfloat16):
            features = net(images.float(), visibility)
        assert features.dtype is torch.bfloat16
        errors[execution] = (features - truth).norm().item() / truth.norm().item()
    assert errors[Execution.tiled] < 0.05
    assert errors[Execution.tiled] < 1.3 * errors[Execution.masked]
