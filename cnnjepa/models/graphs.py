"""Run a network without gradient from CUDA graphs: one launch in place of hundreds.

torch captures a graph for each shape of the input. It reads the input from a buffer of its own and
writes the output to another one, at addresses that never change; weights and statistics are those
of the network, which training changes in place. A graph is used only if, on the first batch of its
shape, it gives the same bits as the network itself. Otherwise the network runs as it is, with a
warning. A run may therefore be resumed with or without graphs.
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from cnnjepa.models.self_check import Outcome, outcome, same_bits, unmoved

log = logging.getLogger(__name__)
MOST_GRAPHS = 32  # each keeps the memory of a pass; further shapes run without


class Graphed:
    """`module` from graphs. `cuda` is torch.cuda; tests pass a stand-in that records ops and repeats them."""

    def __init__(self, module: nn.Module, cuda: Any = torch.cuda) -> None:
        self._module, self._cuda = module, cuda
        self._graphs: dict[tuple[Any, ...], _Graph] = {}
        self._is_off = False

    def __call__(self, x: Tensor) -> Tensor:
        """Return what the module returns, without gradient. The next call with this shape overwrites it."""
        if self._is_off:
            return self._module(x)
        if not self._cuda.is_available() or torch.is_grad_enabled():
            return self._without("there is no CUDA device" if not self._cuda.is_available() else "gradients are asked for", x)
        key = (x.shape, x.stride(), x.dtype, x.device, self._module.training, torch.is_autocast_enabled(x.device.type))
        if key in self._graphs:
            return self._graphs[key].replay(x)
        return self._module(x) if len(self._graphs) == MOST_GRAPHS else self._begun(key, x)

    def _begun(self, key: tuple[Any, ...], x: Tensor) -> Tensor:
        """Capture a graph and hold its first output, and the statistics that it leaves, against the module's."""
        expected = outcome(self._module, self._module, [x])
        buffers = list(self._module.buffers())
        try:
            with unmoved(self._module):  # warming up moves them
                graph = _Graph(self._module, x, self._cuda)
            out = graph.replay(x)
            same = same_bits(Outcome(out, [], buffers), expected)
            cause = "" if same else "a captured pass must give the same bits as the module; got others"
        except RuntimeError as error:
            cause = str(error).partition("\n")[0]
        if not cause:
            self._graphs[key] = graph
            return out
        for buffer, value in zip(buffers, expected.buffers, strict=True):
            buffer.copy_(value)
        self._turn_off(cause)
        return expected.output

    def _turn_off(self, cause: str) -> None:
        log.warning("encoder.graphs is not used: %s", cause)
        self._graphs.clear()
        self._is_off = True

    def _without(self, cause: str, x: Tensor) -> Tensor:
        self._turn_off(cause)
        return self._module(x)


class _Graph:
    """One captured pass, with its buffers."""

    def __init__(self, module: nn.Module, x: Tensor, cuda: Any) -> None:
        self._input = torch.zeros_like(x)  # not `x`: a graph that did not read this buffer would be found out
        aside = cuda.Stream()
        aside.wait_stream(cuda.current_stream())
        with cuda.stream(aside):  # libraries make their plans before a capture, in which they may not
            module(self._input)
        cuda.current_stream().wait_stream(aside)
        self._graph = cuda.CUDAGraph()
        with cuda.graph(self._graph):
            self._output: Tensor = module(self._input)
        self._output.fill_(torch.nan)  # so that what a replay does not write differs from the module's

    def replay(self, x: Tensor) -> Tensor:
        self._input.copy_(x)
        self._graph.replay()
        return self._output
