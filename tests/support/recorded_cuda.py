"""RecordingCuda stands in for torch.cuda where CUDA graphs are tested without a GPU.

It records the ops of a capture, and a replay does them again. It tells which graph is taken, what its buffers hold, when it is not used,
and that a run is the same; nothing about a GPU.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cnnjepa.batch import Batch
from cnnjepa.config import EncoderConfig, TrainConfig
from cnnjepa.data_config import DataConfig
from cnnjepa.methods.cnn_jepa import Config, Method
from cnnjepa.optim import build_optimizer


def _places(values: Any) -> set[int]:
    """Where the tensors among the values lie."""
    return {t.untyped_storage()._cdata for t in tree_leaves(values) if isinstance(t, Tensor)}


class RecordedGraph(TorchDispatchMode):
    """Stands in for a CUDA graph: the ops of a capture, at fixed addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.ops.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, out in self.ops:
            again = func(*args, **kwargs)
            inputs = _places((args, kwargs))
            for place, value in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(place, Tensor) and place.untyped_storage()._cdata not in inputs:
                    place.copy_(value)


class RecordingCuda:
    """Stands in for torch.cuda."""

    def __init__(self, fails: str = "", wrong: bool = False) -> None:
        self.captured: list[RecordedGraph] = []
        self._fails, self._wrong = fails, wrong
        self.pools = 0
        self.put_out: dict[int, list[list[Tensor]]] = {}

    def is_available(self) -> bool:
        return True

    def Stream(self) -> "RecordingCuda":
        return self

    def current_stream(self) -> "RecordingCuda":
        return self

    def wait_stream(self, other: "RecordingCuda") -> None:
        pass

    @contextlib.contextmanager
    def stream(self, stream: "RecordingCuda") -> Iterator[None]:
        yield

    def CUDAGraph(self) -> RecordedGraph:
        self.captured.append(RecordedGraph())
        return self.captured[-1]

    @contextlib.contextmanager
    def graph(self, graph: RecordedGraph) -> Iterator[None]:
        if self._fails:
            raise RuntimeError(self._fails)
        with graph:
            yield
        if self._wrong:
            graph.ops.remove(next(op for op in reversed(graph.ops) if not _places(op[3]) <= _places(op[1:3])))

    def graph_pool_handle(self) -> int:
        self.pools += 1
        return self.pools

    def make_graphed_callables(self, module: nn.Module, sample: tuple[Tensor, ...], pool: int) -> Callable[..., Tensor]:
        """Record a forward and a backward pass of `module`, as torch does it: inputs, outputs and gradients have one place each.

        What other graphs of the pool have put out is overwritten, as it may be on a GPU.
        """
        parameters = list(module.parameters())
        for _ in range(3):
            warm = module(*sample)
            torch.autograd.grad(warm, parameters, torch.empty_like(warm))
        forward, backward = self.CUDAGraph(), self.CUDAGraph()
        with self.graph(forward):
            output = module(*sample)
        upstream = torch.empty_like(output)
        with backward:
            gradients = torch.autograd.grad(output, parameters, upstream)
        output, places = output.detach(), [g.detach() for g in gradients]
        shared = self.put_out.setdefault(pool, [])
        mine = [output, *places]
        shared.append(mine)

        def overwrite() -> None:
            for others in shared:
                if others is not mine:
                    for tensor in others:
                        tensor.fill_(torch.nan)

        class Replayed(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *given: Tensor) -> Tensor:
                for place, value in zip(sample, given, strict=False):
                    place.copy_(value)
                overwrite()
                forward.replay()
                return output.detach()

            @staticmethod
            def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
                upstream.copy_(gradient)
                backward.replay()
                return *(None for _ in sample), *(place.detach() for place in places)

        return lambda *given: Replayed.apply(*given, *parameters)


def trained(dtype: torch.dtype, graphs: Callable[[Method, bool], None], resumed_after: int = 0) -> dict[str, Tensor]:
    """State after 4 steps of CNN-JEPA, resumed after so many; `graphs` may give the method some, and is told whether it resumes."""
    images = torch.randn(4, 3, 24, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    method = optimizer = None
    for step in range(4):
        if method is None or step == resumed_after:
            config = TrainConfig(method=Config(), encoder=EncoderConfig(width=4), data=DataConfig(image_size=24))
            before, method = method, Method(config, total_steps=4).to(dtype).train()
            moments, optimizer = optimizer, build_optimizer(config.optimizer, [p for p in method.parameters() if p.requires_grad])
            graphs(method, before is not None)
            if before is not None and moments is not None:
                method.load_state_dict(before.state_dict())
                optimizer.load_state_dict(moments.state_dict())
        assert optimizer is not None
        optimizer.zero_grad()
        method(Batch([images], step, np.arange(4)))["loss"].backward()
        optimizer.step()
        method.after_step(step)
    assert method is not None
    return method.state_dict()
