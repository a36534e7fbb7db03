"""CUDA graphs without a GPU: RecordingCuda stands in for torch.cuda."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from cnnjepa.methods.cnn_jepa import Method
from cnnjepa.models import graphs
from cnnjepa.models.graphs import Graphed
from cnnjepa.rules import validate
from tests.support import recorded_cuda
from tests.support.recorded_cuda import RecordingCuda
from tests.support.tiny import tiny_config


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).train()


def passes(run: Callable[[Tensor], Tensor], module: nn.Module, shapes: list[int]) -> list[Tensor]:
    """Outputs and statistics of a pass for each size; weights change in place between them, as by EMA."""
    found, random = [], torch.Generator().manual_seed(1)
    for size in shapes:
        with torch.inference_mode():
            found.append(run(torch.randn(2, 3, size, size, generator=random)).clone())
        found += [b.clone() for b in module.buffers()]
        with torch.no_grad():
            for p in module.parameters():
                p.mul_(0.9)
    return found


def assert_as_eager(cuda: RecordingCuda, shapes: list[int]) -> None:
    module, plain = network(), network()
    for a, b in zip(passes(Graphed(module, cuda), module, shapes), passes(plain, plain, shapes), strict=True):
        assert torch.equal(a, b)


def test_each_shape_has_a_graph_and_its_bits_and_statistics_are_the_modules() -> None:
    cuda = RecordingCuda()
    assert_as_eager(cuda, [8, 6, 8, 8, 6])
    assert [g.replays for g in cuda.captured] == [3, 2]


def test_shapes_beyond_the_most_run_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    cuda = RecordingCuda()
    assert_as_eager(cuda, [8, 6, 7, 8, 7])
    assert [g.replays for g in cuda.captured] == [2, 1]


@pytest.mark.parametrize(
    ("cuda", "says"),
    [
        (RecordingCuda(fails="operation not permitted when stream is capturing\nmore"), "operation not permitted when stream is capturing"),
        (RecordingCuda(wrong=True), "a captured pass must give the same bits as the module; got others"),
    ],
    ids=["no capture", "other bits"],
)
def test_a_graph_that_fails_or_differs_is_not_used_and_that_is_said_once(
    cuda: RecordingCuda, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert_as_eager(cuda, [8, 8, 6, 8])
    assert [r.getMessage() for r in caplog.records] == [f"encoder.graphs is not used: {says}"]


def test_without_a_gpu_the_module_runs_as_it_is_and_that_is_said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = RecordingCuda()
    monkeypatch.setattr(cuda, "is_available", lambda: False)
    assert_as_eager(cuda, [8, 8])
    assert [r.getMessage() for r in caplog.records] == ["encoder.graphs is not used: there is no CUDA device"]


def with_graphs(wanted: bool) -> Callable[[Method, bool], None]:
    """Graphs of the target encoder; a run that resumes has the other choice."""

    def give(method: Method, resumes: bool) -> None:
        if wanted != resumes:
            method.run_target = Graphed(method.target_encoder, RecordingCuda())

    return give


def trained(graphed: bool, resumed_after: int = 0) -> dict[str, Tensor]:
    return recorded_cuda.trained(torch.float32, with_graphs(graphed), resumed_after)


def test_a_run_is_the_same_with_graphs_without_and_resumed_with_the_other_choice() -> None:
    plain = trained(False)
    for other in (trained(True), trained(True, resumed_after=2), trained(False, resumed_after=2)):
        assert all(torch.equal(a, b) for a, b in zip(plain.values(), other.values(), strict=True))


def test_it_is_off_by_default_and_refused_where_it_cannot_be() -> None:
    config = tiny_config()
    assert not config.encoder.graphs
    config.encoder.graphs = True
    validate(config, 1)
    assert isinstance(Method(config, 1).run_target, Graphed)
    config.encoder.compile = True
    with pytest.raises(ValueError, match=r"encoder\.graphs must be false with encoder\.compile"):
        validate(config, 1)
    config.encoder.compile, config.encoder.sync_bn = False, True
    with pytest.raises(ValueError, match=r"encoder\.graphs must be false with encoder\.sync_bn on several ranks"):
        validate(config, 2)
