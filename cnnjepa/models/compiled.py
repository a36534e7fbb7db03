"""Run a network through torch.compile, after comparing it with the network itself.

torch compiles for each kind of input. With the first batch of a kind, output, gradients and
statistics must be near those of the network, within `BOUNDS`. Otherwise, or if torch.compile
fails, the network runs as it is from then on, with a warning.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cnnjepa.models.self_check import norm_of_difference, outcome

log = logging.getLogger(__name__)
# Of the norm of a difference over the norm of what it is of: compiled code rounds less often.
BOUNDS = {torch.float64: 1e-9, torch.float32: 0.01, torch.bfloat16: 0.2}


class Compiled:
    """`module` compiled. `compile` is torch.compile; tests pass a stand-in."""

    def __init__(self, module: nn.Module, compile: Callable[..., Any] | None = None) -> None:
        self._module, self._compile = module, compile or torch.compile
        self._compiled: Callable[[Tensor], Tensor] | None = None
        self._checked = set[tuple[Any, ...]]()
        self._is_off = False

    def __call__(self, x: Tensor) -> Tensor:
        """Return what the module returns, to rounding."""
        if self._is_off:
            return self._module(x)
        grad = torch.is_grad_enabled()
        key = x.shape, x.stride(), x.dtype, x.device, self._module.training, grad, torch.is_autocast_enabled(x.device.type)
        if key not in self._checked and not self._agrees(x):
            return self._module(x)
        self._checked.add(key)
        assert self._compiled is not None
        return self._compiled(x)

    def _agrees(self, x: Tensor) -> bool:
        """Return whether the compiled network computes what the module does, which is left as it was."""
        try:
            if self._compiled is None:
                self._compiled = self._compile(self._module.forward, dynamic=False)
            expected = outcome(self._module, self._module, [x])
            far, bound = norm_of_difference(outcome(self._compiled, self._module, [x]), expected), BOUNDS[expected.output.dtype]
            cause = "" if far <= bound else f"a compiled pass must differ by at most {bound:g} from the network's; got {far:g}"
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, OSError, TypeError) as error:  # no compiler, an unknown device, an unsupported operation
            cause = str(error).partition("\n")[0]
        if cause:
            log.warning("torch.compile is not used: %s", cause)
            self._is_off = True
        return not cause
