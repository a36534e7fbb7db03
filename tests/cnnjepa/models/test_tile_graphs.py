"""The context encoder from CUDA graphs, without a GPU: RecordingCuda stands in for torch.cuda. With empty tiles a pass stays exact."""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cnnjepa.config import EncoderConfig, TrainConfig
from cnnjepa.data_config import DataConfig
from cnnjepa.methods.cnn_jepa import Config, Method
from cnnjepa.models import counted_norm, tile_graphs, tile_map, tiles
from cnnjepa.models.masked import Visibility
from cnnjepa.models.resnet import BasicBlock, Bottleneck, ResNet
from cnnjepa.models.tile_graphs import TileGraphs
from cnnjepa.models.tiles import encode_tiles, pass_tiles
from tests.support import recorded_cuda
from tests.support.recorded_cuda import RecordingCuda


@pytest.fixture(autouse=True)
def kernels_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A CPU's kernels count pairs of positions, which a graph cannot; a few threads would change the order of sums."""
    monkeypatch.setattr(tiles, "_kernels", lambda _: tiles.CUDA)
    monkeypatch.setitem(tile_map.SHAPES, "cuda", 4)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network(kind: str = "small") -> ResNet:
    torch.manual_seed(0)
    net = ResNet(BasicBlock, [1, 1, 1], 4, small=True) if kind == "small" else ResNet(Bottleneck, [1, 1, 1, 1], 4)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return net.double().train()


def mask(count: int, shape: tuple[int, int, int], seed: int = 0) -> Visibility:
    """A mask with so many visible cells in all."""
    cells = torch.randperm(int(np.prod(shape)), generator=torch.Generator().manual_seed(seed))[:count]
    visible = torch.zeros(int(np.prod(shape)), dtype=torch.bool)
    visible[cells] = True
    return Visibility(visible.view(shape))


def outcome(net: ResNet, run: Callable[[], Tensor]) -> list[Tensor]:
    """Features, gradients and statistics of a pass."""
    features = run()
    upstream = torch.randn(features.shape, generator=torch.Generator().manual_seed(9), dtype=features.dtype)
    net.zero_grad()
    features.backward(upstream)
    return [
        features.detach().clone(),
        *(p.grad.clone() for p in net.parameters() if p.grad is not None),
        *(b.clone() for b in net.buffers()),
    ]


def assert_near(found: list[Tensor], expected: list[Tensor], bound: float = 1e-9) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= bound * b.abs().max()


@pytest.mark.parametrize("kind", ["small", "usual"])
@pytest.mark.parametrize("count", [2, 3, 13, 14, 20, 26])
def test_empty_tiles_change_nothing(kind: str, count: int) -> None:
    """27 cells in 4 sizes: 7, 14, 21 and 28 tiles; 14 fill their size, 28 are more than there are cells."""
    plain = network(kind)
    roomy = copy.deepcopy(plain)
    cell = plain.cell
    images = torch.randn(3, 3, 3 * cell, 3 * cell, dtype=torch.float64)
    seen = mask(count, (3, 3, 3))
    given = tile_map.roomy(seen)
    assert len(given[0]) % 7 == 0
    assert 0 <= len(given[0]) - count < 7
    rows = tile_map.RoomyTileMap(seen.shape, *given, spare=tile_map.spare_of(seen.shape))
    masked = images * seen.at(images)
    # That an empty tile reads zeros must not depend on what the last image holds.
    assert masked.abs().max() > 0
    a = outcome(plain, lambda: encode_tiles((plain.conv1, plain.bn1), plain.small, plain.blocks(), images, seen))
    b = outcome(roomy, lambda: pass_tiles((roomy.conv1, roomy.bn1), roomy.small, [roomy.blocks()], masked, rows, torch.float64)[0])
    assert_near(b, a)


def test_rows_without_content_do_not_count() -> None:
    norm, other = nn.BatchNorm2d(5).double(), nn.BatchNorm2d(5).double()
    nn.init.uniform_(norm.weight)
    other.load_state_dict(norm.state_dict())
    rows = torch.randn(11, 5, dtype=torch.float64) * 3 + 7
    rows[8:] = 0
    rows.requires_grad_()
    real = rows.detach()[:8].clone().requires_grad_()
    count = torch.tensor(8.0, dtype=torch.float64)

    def clear(x_MC: Tensor) -> Tensor:
        x_MC[8:] = 0
        return x_MC

    upstream = torch.randn(11, 5, dtype=torch.float64)
    y = counted_norm.apply(rows, norm, count, clear)
    y.backward(upstream)
    expected = other(real[None, :, None].permute(0, 3, 1, 2)).permute(0, 2, 3, 1).flatten(0, 2)
    expected.backward(upstream[:8])
    assert rows.grad is not None
    assert_near([y[:8], rows.grad[:8]], [expected, real.grad])  # type: ignore[list-item]
    assert y[8:].abs().max() == rows.grad[8:].abs().max() == 0
    assert_near([norm.weight.grad, norm.bias.grad], [other.weight.grad, other.bias.grad])  # type: ignore[list-item]
    assert_near([norm.running_mean, norm.running_var], [other.running_mean, other.running_var])  # type: ignore[list-item]


def passes(net: ResNet, counts: list[int]) -> list[Tensor]:
    """Outcomes of a pass for each number of visible cells; weights change in place between them."""
    found = []
    for number, count in enumerate(counts):
        images = torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        found += outcome(net, partial(net, images, mask(count, (3, 3, 3), number)))
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(0.9)
    return found


def test_each_size_has_a_graph_and_masks_of_other_counts_share_it() -> None:
    plain, graphed, cuda = network(), network(), RecordingCuda()
    graphed.tile_graphs = TileGraphs(graphed, cuda)
    counts = [20, 9, 15, 13, 21, 8]
    assert_near(passes(graphed, counts), passes(plain, counts))
    # Forward and backward of 21 and of 14 tiles; each is replayed once more when it is compared.
    assert [g.replays for g in cuda.captured] == [4, 4, 4, 4]
    assert cuda.pools == 1


def test_gradients_of_several_micro_batches_add_up() -> None:
    plain, graphed = network(), network()
    graphed.tile_graphs = TileGraphs(graphed, RecordingCuda())
    for net in (plain, graphed):
        for number, count in enumerate([20, 19, 9]):
            images = torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
            net(images, mask(count, (3, 3, 3), number)).square().sum().backward()
    assert_near([p.grad for p in graphed.parameters()], [p.grad for p in plain.parameters()])  # type: ignore[misc]


def wrong_norm(monkeypatch: pytest.MonkeyPatch) -> RecordingCuda:
    """A kernel of the device that forgets the count."""
    right = counted_norm.backward
    monkeypatch.setattr(counted_norm, "backward", lambda g, z, *rest: right(g, z, *rest[:-1], torch.tensor(float(len(z)))))
    return RecordingCuda()


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (lambda _: RecordingCuda(fails="operation not permitted when stream is capturing\nmore"), "operation not permitted when stream is"),
        (lambda _: RecordingCuda(wrong=True), "a captured pass must give the same bits as the pass itself; got others"),
        (wrong_norm, "in float64 a pass with empty tiles must differ by at most 1e-09; got "),
    ],
    ids=["no capture", "other bits", "a wrong kernel"],
)
def test_a_graph_that_fails_or_differs_is_not_used_and_that_is_said_once(
    made: Callable[[pytest.MonkeyPatch], RecordingCuda], says: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain, graphed = network(), network()
    graphed.tile_graphs = TileGraphs(graphed, made(monkeypatch))
    for a, b in zip(passes(graphed, [20, 9, 20]), passes(plain, [20, 9, 20]), strict=True):
        assert torch.equal(a, b)
    (message,) = [r.getMessage() for r in caplog.records]
    assert message.startswith(f"encoder.graphs is not used for the context encoder: {says}")


def test_without_a_gpu_the_encoder_runs_as_it_is_and_that_is_said(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, graphed, cuda = network(), network(), RecordingCuda()
    monkeypatch.setattr(cuda, "is_available", lambda: False)
    graphed.tile_graphs = TileGraphs(graphed, cuda)
    for a, b in zip(passes(graphed, [20, 9]), passes(plain, [20, 9]), strict=True):
        assert torch.equal(a, b)
    assert [r.getMessage() for r in caplog.records] == ["encoder.graphs is not used for the context encoder: there is no CUDA device"]


def trained(graphed: bool, resumed_after: int = 0) -> dict[str, Tensor]:
    def give(method: Any, resumes: bool) -> None:
        if graphed:
            method.encoder.tile_graphs = TileGraphs(method.encoder, RecordingCuda())

    return recorded_cuda.trained(torch.float64, give, resumed_after)


def test_a_run_is_the_same_to_rounding_and_a_resumed_one_has_the_same_bits() -> None:
    plain, graphed, resumed = trained(False), trained(True), trained(True, resumed_after=2)
    for key, value in plain.items():
        assert torch.equal(graphed[key], resumed[key])
        assert (graphed[key] - value).abs().max() <= 1e-6 * value.abs().max().clamp_min(1e-12)  # AdamW divides by small gradients


def test_the_encoder_gets_graphs_where_they_are_asked_for_and_its_copies_have_none() -> None:
    config = TrainConfig(method=Config(), encoder=EncoderConfig(width=4, graphs=True), data=DataConfig(image_size=24))
    method: Any = Method(config, total_steps=4)
    assert isinstance(method.encoder.tile_graphs, tile_graphs.TileGraphs)
    assert method.target_encoder.tile_graphs is None
    assert copy.deepcopy(method.encoder).tile_graphs is None
