"""torch.compile is used after a comparison. A stand-in for it is called with the network's own forward, right or wrong."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cnnjepa.config import EncoderConfig, TrainConfig
from cnnjepa.data_config import DataConfig
from cnnjepa.methods.cnn_jepa import Config, Method
from cnnjepa.models.compiled import Compiled


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).double().train()


class Compiler:
    """Stands in for torch.compile: what it makes computes `of(what the network computes)`."""

    def __init__(self, of: Callable[[Tensor], Tensor] = lambda out: out) -> None:
        self.of = of
        self.made = self.calls = 0

    def __call__(self, forward: Callable[[Tensor], Tensor], dynamic: bool) -> Callable[[Tensor], Tensor]:
        assert not dynamic
        self.made += 1

        def run(x: Tensor) -> Tensor:
            self.calls += 1
            return self.of(forward(x))

        return run


class Scaled(torch.autograd.Function):
    """The values are right, and the gradients so many times what they are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, times: float) -> Tensor:
        ctx.times = times
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.times * gradient, None


def passes(run: Callable[[Tensor], Tensor], net: nn.Module, with_gradient: bool) -> list[Tensor]:
    """Outputs, gradients and statistics of four batches of two sizes."""
    found = []
    for number, size in enumerate([8, 8, 6, 8]):
        images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        net.zero_grad()
        with torch.inference_mode(not with_gradient):
            out = run(images.requires_grad_(with_gradient))
        if with_gradient:
            out.square().sum().backward()
            found += [p.grad.clone() for p in [*net.parameters(), images] if p.grad is not None]
        found += [out.detach().clone(), *(b.clone() for b in net.buffers())]
    return found


@pytest.mark.parametrize("with_gradient", [True, False])
def test_what_agrees_is_used_and_statistics_move_once(with_gradient: bool) -> None:
    net, plain, compiler = network(), network(), Compiler()
    for a, b in zip(passes(Compiled(net, compiler), net, with_gradient), passes(plain, plain, with_gradient), strict=True):
        assert torch.equal(a, b)
    assert (compiler.made, compiler.calls) == (1, 4 + 2), "each batch, and once more for each of two sizes"


def fails(_: Tensor) -> Tensor:
    raise RuntimeError("no working compiler\nand much more")


def drops_a_value(out: Tensor) -> Tensor:
    return out * (1 - torch.eye(out.shape[-1], dtype=out.dtype))


@pytest.mark.parametrize(
    ("of", "says"),
    [
        (fails, "no working compiler"),
        (drops_a_value, "a compiled pass must differ by at most 1e-09 from the network's; got 0."),
        (lambda out: Scaled.apply(out, 2), "a compiled pass must differ by at most 1e-09 from the network's; got 1"),
        (lambda out: Scaled.apply(out, torch.nan), "a compiled pass must differ by at most 1e-09 from the network's; got nan"),
        (lambda out: out * torch.nan, "a compiled pass must differ by at most 1e-09 from the network's; got nan"),
    ],
    ids=["no compiler", "other values", "other gradients", "nan as gradients", "nan"],
)
def test_what_fails_or_differs_is_not_used_and_that_is_said_once(
    of: Callable[[Tensor], Tensor], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    net, plain = network(), network()
    for a, b in zip(passes(Compiled(net, Compiler(of)), net, True), passes(plain, plain, True), strict=True):
        assert torch.equal(a, b)
    (message,) = [r.getMessage() for r in caplog.records]
    assert message.startswith(f"torch.compile is not used: {says}")


def test_a_device_out_of_memory_is_not_taken_for_a_missing_compiler() -> None:
    def full(_: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    net = network()
    with pytest.raises(torch.OutOfMemoryError):
        passes(Compiled(net, Compiler(full)), net, True)


def test_target_encoder_and_predictor_are_compiled_where_that_is_asked_for() -> None:
    config = TrainConfig(method=Config(), encoder=EncoderConfig(width=4, compile=True), data=DataConfig(image_size=24))
    method: Any = Method(config, total_steps=4)
    assert isinstance(method.run_target, Compiled)
    assert isinstance(method.run_predictor, Compiled)
    assert not any(".run_" in name for name in method.state_dict())
