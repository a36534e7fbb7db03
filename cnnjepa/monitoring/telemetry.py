"""Send statistics of gradients and features at logged steps to TensorBoard only."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnnjepa.monitoring.recorder import Recorder

_SAMPLED = 100_000  # at most this many gradients per part in a histogram


def part_of(name: str) -> str:
    """Return the part of a parameter: a stage of the encoder, or another module of the method."""
    first, _, rest = name.partition(".")
    if first != "encoder":
        return first
    stage, _, inner = rest.partition(".")
    if stage in ("conv1", "bn1", "stem", "patch_embed"):
        return "encoder.stem"
    return f"encoder.{stage}.{inner.partition('.')[0]}" if stage in ("stages", "blocks") else f"encoder.{stage}"


def feature_statistics(name: str, features_BD: Tensor) -> dict[str, Tensor]:
    """Return the mean norm, and the std of unit features: 1 for an even spread, 0 if collapsed."""
    std = F.normalize(features_BD, dim=1).std(0).mean() * features_BD.shape[1] ** 0.5
    return {f"representations/{name}_std": std, f"representations/{name}_norm": features_BD.norm(dim=1).mean()}


class Telemetry:
    """Observes logged steps: features of this rank's last micro-batch, gradients of all ranks."""

    def __init__(self, method: nn.Module, wanted: bool) -> None:
        self._wanted = wanted
        self._parts: dict[str, list[nn.Parameter]] = {}
        for name, parameter in method.named_parameters() if wanted else ():
            if parameter.requires_grad:
                self._parts.setdefault(part_of(name), []).append(parameter)
        self._logged = self._pictured = False
        self.shown: dict[str, Tensor] | None = None
        self._norms: dict[str, Tensor] = {}
        self._samples: dict[str, Tensor] = {}

    def start_step(self, logged: bool, pictured: bool) -> None:
        """Begin a step; `logged` requests scalars, `pictured` requests histograms.

        `shown` becomes the dictionary where the method stores its features, or None.
        """
        self._logged, self._pictured = self._wanted and logged, self._wanted and pictured
        self.shown = {} if self._logged else None

    @torch.no_grad()
    def see_gradients(self) -> None:
        """Take in the averaged gradients before the optimiser overwrites them.

        The host waits for the device only if a histogram is due.
        """
        if not self._logged and not self._pictured:
            return
        found = {part: [p.grad for p in parameters if p.grad is not None] for part, parameters in self._parts.items()}
        found = {part: gradients for part, gradients in found.items() if gradients}
        if self._logged:
            self._norms = {f"gradients/{part}": nn.utils.get_total_norm(g) for part, g in found.items()}
        # own tags: a tag that is also a scalar breaks TensorBoard's page of hparams
        if self._pictured:
            self._samples = {f"gradient_values/{part}": sampled(g).float().cpu() for part, g in found.items()}

    @torch.no_grad()
    def tell(self, recorder: Recorder, step: int) -> None:
        """Record the statistics of the finished step."""
        if self._logged:
            values = dict(self._norms)
            for name, features in (self.shown or {}).items():
                values |= feature_statistics(name, features)
            if values:
                numbers = torch.stack([v.double() for v in values.values()]).tolist()
                recorder.scalars(step, dict(zip(values, numbers, strict=True)))
        if self._pictured:
            recorder.histograms(step, self._samples)
        self.shown, self._norms, self._samples = None, {}, {}


def sampled(gradients: list[Any]) -> Tensor:
    """Return at most `_SAMPLED` values of the gradients, evenly spaced."""
    every = -(-sum(g.numel() for g in gradients) // _SAMPLED)
    return torch.cat([g.flatten()[::every] for g in gradients])
