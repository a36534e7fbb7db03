"""One whole training step: ours against one of the official kind, and where ours spends its time.

    python tests/benchmarks/step.py [--json] [--batches 16 32] [--dtypes fp32 bf16] [--threads 1] [--rounds 7] [--encoder resnet50]
                                    [--size 224] [--compile | --graphs]
    python tests/benchmarks/step.py --bytes [--json] [--batches 128] [--dtypes bf16] [--encoder resnet50] [--size 224]

A step is masks, context encoder, target encoder, predictor, loss, backward pass, gradient norm, AdamW and EMA, on images that are on the
device. `official` keeps to the official code's kind: masked execution (see encoder.py), default memory format, AdamW and EMA parameter by
parameter; its masks are given to it and cost it nothing. `masked` is our step with `encoder.execution=masked`. All run in turn in one
process on new masks; figures are medians of the rounds' ratios. Peak memory is that of all tensors of a third step: weights, gradients and
the optimiser's averages among them.

With `--bytes` nothing is timed: what each part of our step reads and writes, and its launches, are computed by the rules of
cnnjepa/monitoring/traffic.py.
"""

import argparse
import copy
import logging
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _bytes import computed
from _bytes_shown import notes_of, table_of
from _report import publish
from _turns import AUTOCAST, in_turn, official_style, peak_mb, ratio, real_masks, spread
from rich.table import Table
from torch import Tensor, nn

from cnnjepa.batch import Batch
from cnnjepa.config import EncoderConfig, EncoderName, Execution, TrainConfig
from cnnjepa.data_config import DataConfig
from cnnjepa.methods.cnn_jepa import Config, Method
from cnnjepa.models.masked import Visibility
from cnnjepa.models.resnet import FEWEST_CELLS
from cnnjepa.optim import build_optimizer

WAYS = ["tiled", "masked", "official"]
MOMENTUM = 0.996


def plain_predictor(predictor: nn.Module, x_BChw: Tensor) -> Tensor:
    """The predictor with torch's own convolutions."""
    for layer in predictor.children():
        x_BChw = nn.Conv2d.forward(layer, x_BChw) if isinstance(layer, nn.Conv2d) else layer(x_BChw)
    return x_BChw


class Bench:
    """The same weights three times: for our step, for ours under masked execution, and for one of the official kind."""

    def __init__(self, asked: argparse.Namespace, batch: int, dtype: str, ways: list[str]) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.batch, self.dtype = batch, dtype
        images = torch.randn(batch, 3, asked.size, asked.size, generator=torch.Generator().manual_seed(0)).to(self.device)
        self.images = {way: images if way == "official" else images.to(memory_format=torch.channels_last) for way in ways}
        self.methods: dict[str, Method] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.parts: dict[str, float] = {}
        for way in ways:
            execution = Execution.tiled if way == "tiled" else Execution.masked
            compiled, graphs = asked.compile and way == "tiled", asked.graphs and way == "tiled"
            encoder = EncoderConfig(EncoderName[asked.encoder], execution=execution, compile=compiled, graphs=graphs)
            config = TrainConfig(method=Config(), encoder=encoder, data=DataConfig(image_size=asked.size))
            memory_format = torch.contiguous_format if way == "official" else torch.channels_last
            method = Method(config, total_steps=1000).to(self.device, memory_format=memory_format).train()
            parameters = [p for p in method.parameters() if p.requires_grad]
            self.methods[way] = method
            plain = torch.optim.AdamW(parameters, lr=config.optimizer.lr, weight_decay=config.optimizer.weight_decay, foreach=False)
            self.optimizers[way] = plain if way == "official" else build_optimizer(config.optimizer, parameters)

    def autocast(self) -> torch.autocast:
        """As the trainer does it."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=AUTOCAST[self.dtype])

    def ours(self, way: str, step: int) -> None:
        """What cnnjepa/train.py does for one step of one rank."""
        method, optimizer = self.methods[way], self.optimizers[way]
        optimizer.zero_grad()
        with self.autocast():
            loss = method(Batch([self.images[way]], step, np.arange(self.batch)))["loss"]
        loss.backward()
        torch.nn.utils.get_total_norm(p.grad for p in method.parameters() if p.grad is not None).item()
        optimizer.step()
        method.after_step(step)

    def official(self, step: int) -> None:
        """A step of the official kind."""
        method, optimizer, images = self.methods["official"], self.optimizers["official"], self.images["official"]
        visible = real_masks(step, self.batch, method.grid).to(self.device)
        optimizer.zero_grad()
        with self.autocast():
            context = official_style(method.encoder, images, visible)
            filled = torch.where(visible[:, None], context, method.mask_token.to(context.dtype))
            prediction = plain_predictor(method.predictor, filled)
            with torch.no_grad():
                target = method.target_encoder(images)
        hidden = ~visible
        unit = [F.normalize(x.float().permute(0, 2, 3, 1), dim=-1)[hidden] for x in (prediction, target)]
        loss = F.smooth_l1_loss(*unit, reduction="none").sum(-1).mean()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(method.target_encoder.parameters(), method.encoder.parameters(), strict=True):
                slow.copy_(MOMENTUM * slow + (1 - MOMENTUM) * fast)

    def do(self, way: str, step: int) -> Callable[[], None]:
        """One step of a way."""
        return lambda: self.official(step) if way == "official" else self.ours(way, step)

    def breakdown(self, rounds: int) -> dict[str, float]:
        """Seconds of the parts of our step, each alone: medians."""
        method, found = self.methods["tiled"], {}
        predictor = copy.deepcopy(method.predictor)
        channels, grid = method.encoder.out_channels, method.grid
        dtype = torch.bfloat16 if AUTOCAST[self.dtype] else torch.float32
        x = torch.rand(self.batch, channels, grid, grid, device=self.device, dtype=dtype).to(memory_format=torch.channels_last)

        def encode(step: int) -> None:
            batch = Batch([self.images["tiled"]], step, np.arange(self.batch))
            with self.autocast():
                features = method.encoder(batch.views[0], method.visibility(batch))
            features.float().mean().backward()

        def target(_step: int) -> None:
            with torch.inference_mode(), self.autocast():
                method.run_target(self.images["tiled"])

        def predict(_step: int) -> None:
            with self.autocast():
                out = predictor(x.clone().requires_grad_())
            out.float().mean().backward()

        def update(step: int) -> None:
            torch.nn.utils.get_total_norm(p.grad for p in method.parameters() if p.grad is not None).item()
            self.optimizers["tiled"].step()
            method.after_step(step)

        parts = {"context encoder": encode, "target encoder": target, "predictor": predict, "norm, AdamW, EMA": update}
        times = in_turn(lambda i: {name: lambda part=part: part(i) for name, part in parts.items()}, rounds, self.device)
        for name, spent in times.items():
            found[name] = statistics.median(spent)
        return found

    def peak(self, way: str) -> float:
        """MiB of tensors at the peak of a step, those of its method and optimiser among them."""
        for step in range(2):
            self.do(way, step)()
        method, state = self.methods[way], self.optimizers[way].state.values()
        lasting = [*method.parameters(), *method.buffers(), *(t for s in state for t in s.values()), self.images[way]]
        held = sum(t.numel() * t.element_size() for t in lasting) / 2**20
        self.optimizers[way].zero_grad()
        return held + peak_mb(self.do(way, 2), self.device)

    def synchronisations(self) -> int | None:
        """How often the host waits for the device in one forward and backward pass; None without CUDA."""
        if self.device.type != "cuda":
            return None
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught, self.autocast():
                warnings.simplefilter("always")
                self.methods["tiled"](Batch([self.images["tiled"]], 3, np.arange(self.batch)))["loss"].backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(w.message) for w in caught)


def require_same_features(bench: Bench) -> None:
    """Raise RuntimeError unless all ways encode the same: context features in fp32, to rounding."""
    visible = real_masks(0, bench.batch, bench.methods["tiled"].grid)
    found = {}
    for way, method in bench.methods.items():
        net, images = copy.deepcopy(method.encoder), bench.images[way]
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            masks = Visibility(visible, bench.device)
            found[way] = official_style(net, images, masks.visible_Bhw) if way == "official" else net(images, masks)
    for way, features in found.items():
        apart = ((features - found["tiled"]).norm() / found["tiled"].norm()).item()
        if not apart < 1e-3:
            raise RuntimeError(f"{way} and tiled execution must agree to 1e-3 in fp32; they are {apart:.1e} apart")


def measure(bench: Bench, rounds: int) -> dict[str, Any]:
    """One batch size and type."""
    require_same_features(bench)
    times = in_turn(lambda step: {way: bench.do(way, step) for way in WAYS}, rounds, bench.device)
    peaks = {way: bench.peak(way) for way in WAYS}
    return {
        "batch": bench.batch,
        "dtype": bench.dtype,
        "official_style_over_fast": ratio(times, "official", "tiled"),
        "official_style_over_fast_range": spread(times, "official", "tiled"),
        "masked_over_fast": ratio(times, "masked", "tiled"),
        "seconds": {way: statistics.median(t) for way, t in times.items()},
        "images_per_second": bench.batch / statistics.median(times["tiled"]),
        "peak_mb": peaks,
        "peak_fast_over_official": peaks["tiled"] / peaks["official"],
        "parts": bench.breakdown(rounds),
        "synchronisations": bench.synchronisations(),
    }


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--batches", type=int, nargs="+", help="images (default: 16; with --bytes 128)")
    parser.add_argument("--dtypes", choices=AUTOCAST, nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--encoder", choices=[e.name for e in EncoderName if "resnet" in e.name], default="resnet50")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--compile", action="store_true", help="ours with encoder.compile=true")
    parser.add_argument(
        "--graphs", action="store_true", help="ours with encoder.graphs=true; without a GPU that changes nothing, and is said"
    )
    parser.add_argument("--bytes", action="store_true", help="compute bytes and launches of our step in bf16; time nothing")
    asked = parser.parse_args()
    if asked.graphs and asked.compile:
        parser.error("--graphs takes the place of --compile; give one of them")
    asked.batches = asked.batches or [128 if asked.bytes else 16]
    torch.set_num_threads(asked.threads)
    if asked.bytes:
        figures = computed(asked.encoder, asked.size, asked.batches, AUTOCAST[asked.dtypes[-1]])
        publish(asked.json, 0, figures, table_of(figures["rows"][0]), notes_of(figures))
        return 1 if figures["trace"]["lacking"] else 0
    FEWEST_CELLS.clear()  # tiles are measured also where they would not be taken
    logging.basicConfig(format="%(message)s")
    rows = []
    for dtype in asked.dtypes:
        for batch in asked.batches:
            row = measure(Bench(asked, batch, dtype, WAYS), asked.rounds)
            rows.append(row)
    figures = {"threads": asked.threads, "encoder": asked.encoder, "size": asked.size, "compile": asked.compile, "graphs": asked.graphs}
    for row in rows:
        if row["batch"] == asked.batches[0]:
            suffix = "" if row["dtype"] == "fp32" else f"_{row['dtype']}"
            figures |= {f"{key}{suffix}": row[key] for key in ("official_style_over_fast", "peak_fast_over_official")}
    figures["rows"] = rows
    table = Table("batch", "dtype", "official/ours", "range", "masked/ours", "images/s", "peak ours/official", "parts, s")
    for r in rows:
        low, high = r["official_style_over_fast_range"]
        parts = ", ".join(f"{name} {spent:.2f}" for name, spent in r["parts"].items())
        shown = [f"{r['official_style_over_fast']:.2f}", f"{low:.2f}-{high:.2f}", f"{r['masked_over_fast']:.2f}"]
        table.add_row(str(r["batch"]), r["dtype"], *shown, f"{r['images_per_second']:.2f}", f"{r['peak_fast_over_official']:.2f}", parts)
    waits = [f"{r['synchronisations']} waits for the device in forward and backward, {r['dtype']}" for r in rows if r["synchronisations"]]
    publish(asked.json, asked.rounds, figures, table, [f"{asked.threads} threads, {asked.encoder}, {asked.size} px", *waits])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
