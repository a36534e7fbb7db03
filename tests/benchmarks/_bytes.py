"""What one training step of CNN-JEPA reads and writes, by part and layer, by the rules of cnnjepa/monitoring/traffic.py.

The step is that of cnnjepa/train.py, on tensors without memory (torch's FakeTensorMode), with the kernels that CUDA takes.

The layers are products and convolutions, BatchNorm, ReLU and sums, of which a network consists on paper. What is beside them (reading
tiles with their edges, casts and copies, the loss, norm, optimiser and EMA) is in the whole step. With BatchNorm, ReLU and sum as one
kernel, ReLU moves nothing, a sum reads only the shortcut, and ReLU's gradient takes its sign from what BatchNorm's gradient reads anyway;
after a sum it reads the output and writes the shortcut's gradient.
"""

import bisect
import contextlib
import copy
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from _turns import real_masks
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from cnnjepa.batch import Batch
from cnnjepa.config import EncoderConfig, EncoderName, TrainConfig
from cnnjepa.data_config import DataConfig
from cnnjepa.methods.cnn_jepa import Config, Method
from cnnjepa.models import tile_map, tiles
from cnnjepa.models.masked import Visibility
from cnnjepa.monitoring.traffic import KINDS, LAYERS, REST, Moved, Traffic
from cnnjepa.optim import build_optimizer


@dataclass
class Where:
    """Which part and layer the forward pass is in; the backward pass is found again by autograd's own numbering of its nodes."""

    now: tuple[str, str] = ("", "")
    begins: list[int] = field(default_factory=lambda: [0])
    places: list[tuple[str, str]] = field(default_factory=lambda: [("", "")])

    def at(self, part: str, layer: str = "") -> None:
        """The forward pass goes on here."""
        self.now = part, layer
        self.begins.append(torch._C._autograd._get_sequence_nr())  # type: ignore[attr-defined]
        self.places.append(self.now)

    def look(self) -> tuple[str, str, bool]:
        """Part, layer and whether this is the backward pass."""
        node = torch._C._current_autograd_node()  # type: ignore[attr-defined]
        if node is None:
            return *self.now, False
        known = bisect.bisect_right(self.begins, node._sequence_nr()) - 1
        last = len(self.places) - 1
        if known == last and node.name().endswith("AccumulateGrad"):  # numbered last, whatever it belongs to
            return "gradients", "", True
        return *self.places[known], True


@contextlib.contextmanager
def _put(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def as_on_cuda() -> Iterator[None]:
    """The kernels and the sizes that tiled execution takes on CUDA."""
    before = dict(tile_map.SHAPES)
    tile_map.SHAPES["cpu"] = tile_map.SHAPES["cuda"]
    try:
        with _put(tiles, "_kernels", lambda _: tiles.CUDA):
            yield
    finally:
        tile_map.SHAPES.clear()
        tile_map.SHAPES.update(before)


@contextlib.contextmanager
def labelled(method: Method, where: Where) -> Iterator[None]:
    """Tell `where` which part and layer begins."""
    names = {id(b): name.partition(".")[0] for name, b in method.encoder.named_modules() if name.count(".") == 1}
    stem, layers = tiles._stem, tiles._layers

    def in_stem(*args: Any) -> Tensor:
        where.at("context encoder", "stem")
        out = stem(*args)
        where.at("context encoder", "max-pool")
        return out

    def in_block(block: Any, side: int) -> Any:
        where.at("context encoder", names[id(block)])
        return layers(block, side)

    def on(module: nn.Module, part: str, layer: str = "", after: bool = False) -> Any:
        def tell(*_: Any) -> None:
            where.at(part, layer)

        return module.register_forward_hook(tell) if after else module.register_forward_pre_hook(tell)

    target = method.target_encoder
    hooks = [on(target, "target encoder", "stem"), on(target.relu, "target encoder", "max-pool", after=True)]
    hooks += [
        on(b, "target encoder", n.partition(".")[0]) for n, b in target.named_modules() if n.startswith("layer") and n.count(".") == 1
    ]
    hooks += [on(method.predictor, "predictor"), on(method.predictor, "loss", after=True), on(method.encoder, "context encoder", "indices")]
    try:
        with _put(tiles, "_stem", in_stem), _put(tiles, "_layers", in_block):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def expected_mask(batch: int, grid: int, steps: int = 1000) -> Tensor:
    """The masks of the step whose visible fraction is nearest to the mean over `steps` steps."""
    masks = [real_masks(step, batch, grid) for step in range(steps)]
    fractions = np.array([m.float().mean().item() for m in masks])
    return masks[int(np.abs(fractions - fractions.mean()).argmin())]


def _without_memory(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)


def _emptied(method: Method) -> None:
    """Replace weights and buffers by tensors without memory; call it under FakeTensorMode."""
    for module in method.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(_without_memory(p), p.requires_grad)
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = _without_memory(b)


def _masks_without_memory(mask: Visibility) -> Visibility:
    mask = copy.copy(mask)
    for name in ("cells", "hidden_cells", "visible_Bhw"):
        setattr(mask, name, _without_memory(getattr(mask, name)))
    return mask


class Step:
    """One step of CNN-JEPA, as cnnjepa/train.py does it, with or without memory behind its tensors."""

    def __init__(self, encoder: str, size: int, batch: int, bf16: bool, real: bool = False, mask: Tensor | None = None) -> None:
        config = TrainConfig(method=Config(), encoder=EncoderConfig(EncoderName[encoder]), data=DataConfig(image_size=size))
        self.method = Method(config, total_steps=1000).to(memory_format=torch.channels_last).train()
        self.batch, self.bf16 = batch, bf16
        self.fake = contextlib.nullcontext() if real else FakeTensorMode()
        seen = Visibility(expected_mask(batch, self.method.grid) if mask is None else mask)
        self.fraction = seen.fraction
        with self.fake:
            if not real:
                _emptied(self.method)
                seen = _masks_without_memory(seen)
            self.method.visibility = lambda _: self._anew(seen)  # type: ignore[method-assign]
            self.pixels = torch.zeros(batch, 3, size, size, dtype=torch.uint8).to(memory_format=torch.channels_last)
            self.parameters = [p for p in self.method.parameters() if p.requires_grad]
            self.optimizer = build_optimizer(config.optimizer, self.parameters)

    @staticmethod
    def _anew(mask: Visibility) -> Visibility:
        """What it has found out about a mask is found out again at each step."""
        mask = copy.copy(mask)
        mask._positions, mask._masks = {}, {}
        return mask

    def run(self, where: Where) -> None:
        """The step."""
        where.at("images")
        self.optimizer.zero_grad()
        images = (self.pixels.to(torch.float32, memory_format=torch.channels_last) / 255 - 0.5) / 0.25
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            loss = self.method(Batch([images], 0, np.arange(self.batch)))["loss"]
        loss.backward()
        where.at("gradient norm")
        torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        where.at("AdamW")
        self.optimizer.step()
        where.at("EMA")
        self.method.after_step(0)

    def count(self) -> list[Moved]:
        """What each op of the second step moves: the first one makes the optimiser's averages."""
        with self.fake, as_on_cuda():
            self.run(Where())
            where = Where()
            with labelled(self.method, where), Traffic(where.look) as traffic:
                self.run(where)
        return traffic.found


def fused_saving(m: Moved, ends: set[tuple[int, ...]]) -> int:
    """Bytes that one op no longer moves with BatchNorm, ReLU and sum as one kernel; `ends` are the shapes of outputs of residual blocks."""
    if m.op in ("relu", "relu_") and not m.backward:
        return m.bytes
    if m.op in ("add_", "add") and not m.backward and m.shapes[0] in ends:
        return m.bytes * 2 // 3
    if m.op == "threshold_backward":
        return m.bytes // 3 if m.shapes[0] in ends and m.part == "context encoder" else m.bytes
    return 0


def summed_shapes(found: list[Moved]) -> set[tuple[int, ...]]:
    """Shapes of the sums at the ends of residual blocks."""
    return {m.shapes[0] for m in found if m.op in ("add_", "add") and m.layer.startswith("layer") and len(m.shapes) == 2 and not m.backward}


def figures_of(found: list[Moved], batch: int, fraction: float) -> dict[str, Any]:
    """MB per image and launches per step: whole, of the layers alone, fused, and by part, layer and kind."""
    ends, each = summed_shapes(found), 1e6 * batch
    layers = sum(m.bytes for m in found if m.kind in LAYERS)
    saved = sum(fused_saving(m, ends) for m in found)
    rows: dict[tuple[str, str, bool], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for m in found:
        row = rows[m.part, m.layer, m.backward]
        row[m.kind if m.kind in LAYERS else "beside"] += m.bytes / each
        row["launches"] += m.launches
    return {
        "batch": batch,
        "visible": fraction,
        "layers_mb": layers / each,
        "layers_fused_mb": (layers - saved) / each,
        "step_mb": sum(m.bytes for m in found) / each,
        "step_fused_mb": (sum(m.bytes for m in found) - saved) / each,
        "launches": sum(m.launches for m in found),
        "kinds_mb": {kind: sum(m.bytes for m in found if m.kind == kind) / each for kind in (*KINDS, REST)},
        "rows": [{"part": p, "layer": layer, "backward": back, **row} for (p, layer, back), row in rows.items()],
    }


def _key(op: str, shapes: Any) -> tuple[str, tuple[tuple[int, ...], ...]]:
    """An op in place counts as the one that is not: autograd prefers the other on tensors without memory."""
    name = op.rstrip("_") if op in ("add_", "index_add_") else op
    listed = name.startswith(("_foreach", "_fused")) or name in ("cat", "stack", "index", "index_put_")  # whose shapes a trace leaves out
    return name, () if listed else tuple(tuple(s) for s in shapes if s)


def against_trace(found: list[Moved], step: "Step") -> tuple[int, list[str]]:
    """Hold the ops against torch's own record of the same step with real tensors: how many, and those that the record lacks."""
    with as_on_cuda():
        step.run(Where())
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
            step.run(Where())
    # Not `recorded.events()`, which takes longer than the step.
    events = recorded.profiler.kineto_results.events()  # type: ignore[union-attr]
    there = Counter(_key(e.name()[6:], e.shapes()) for e in events if e.name().startswith("aten::"))
    counted = Counter(_key(m.op, m.shapes) for m in found)
    return sum(counted.values()), [f"{n} x {op} of {shapes}" for (op, shapes), n in (counted - there).items()]


def computed(encoder: str, size: int, batches: list[int], bf16: bool) -> dict[str, Any]:
    """The figures of each batch size, and how a small step's ops compare with a recorded trace."""
    rows = []
    for batch in batches:
        step = Step(encoder, size, batch, bf16)
        rows.append(figures_of(step.count(), batch, step.fraction))
    small = 2, real_masks(0, 2, 4 if encoder == "resnet_small" else 3)
    pixels = 32 if encoder == "resnet_small" else 96
    found = Step(encoder, pixels, small[0], bf16, mask=small[1]).count()
    ops, lacking = against_trace(found, Step(encoder, pixels, small[0], bf16, real=True, mask=small[1]))
    return {"rows": rows, "trace": {"ops": ops, "lacking": lacking, "batch": small[0], "size": pixels}}
