"""The context encoder, forward and backward: tiles against dense and masked execution, by visible fraction.

    python tests/benchmarks/encoder.py [--json] [--batches 16 32] [--dtypes fp32 bf16] [--threads 1] [--rounds 7] [--encoder resnet50]
                                       [--size 224] [--fractions .25 .4 .52 .6 .8 .96 1] [--stages] [--quick] [--peak-tflops 312]

`dense` is the network without a mask, `masked` masked execution of the official kind (dense convolution x mask, gathered BatchNorm, in the
default memory format), `reference` this project's masked execution. Each round runs all in turn, on new masks; figures are medians of the
rounds' ratios. Seconds are processor seconds on one thread, else the clock's. `mixed` are the paper's masks, whose fraction differs from
round to round; the others hide the same number of cells in each image, in half as many rounds. --stages says where the time goes.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from _report import publish
from _turns import AUTOCAST, exact_masks, in_turn, official_style, peak_mb, ratio, real_masks, spread
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cnnjepa.config import EncoderConfig, EncoderName, Execution
from cnnjepa.models.masked import Visibility
from cnnjepa.models.resnet import FEWEST_CELLS, ResNet, build_encoder
from cnnjepa.models.tile_map import TileMap
from cnnjepa.models.tiles import run_blocks

HEADLINE = ("visible", "tiled_over_dense", "tiled_over_limit", "masked_over_tiled")


class Bench:
    """One network and one batch of images."""

    def __init__(self, asked: argparse.Namespace, batch: int, dtype: str) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.quick = asked.quick
        self.batch, self.dtype, self.grid = batch, dtype, asked.size // (8 if asked.encoder == "resnet_small" else 32)
        config = EncoderConfig(EncoderName[asked.encoder])
        self.net: ResNet = build_encoder(config, 0).to(self.device, memory_format=torch.channels_last).train()
        self.plain: ResNet = build_encoder(config, 0).to(self.device).train()
        generator = torch.Generator().manual_seed(0)
        self.plain_images = torch.randn(batch, 3, asked.size, asked.size, generator=generator).to(self.device)
        self.images = self.plain_images.to(memory_format=torch.channels_last)

    def run(self, encode: Callable[[], Tensor]) -> Callable[[], None]:
        """Forward, backward, and the gradients let go."""

        def both() -> None:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=AUTOCAST[self.dtype]):
                features = encode()
            features.float().square().mean().backward()
            for net in (self.net, self.plain):
                net.zero_grad()

        return both

    def reference(self, visible: Tensor) -> Tensor:
        """This project's masked execution."""
        self.net.execution = Execution.masked
        try:
            return self.net(self.images, Visibility(visible, self.device))
        finally:
            self.net.execution = Execution.tiled

    def ways(self, visible: Tensor) -> dict[str, Callable[[], None]]:
        """All ways under the same mask."""
        return {
            "tiled": self.run(lambda: self.net(self.images, Visibility(visible, self.device))),
            "dense": self.run(lambda: self.net(self.images)),
            "masked": self.run(lambda: official_style(self.plain, self.plain_images, visible.to(self.device))),
            "reference": self.run(lambda: self.reference(visible)),
        }

    def measure(self, fraction: float | None, rounds: int) -> dict[str, Any]:
        """Ratios at one visible fraction, or of the paper's masks."""
        seen: list[float] = []

        def ways(turn: int) -> dict[str, Callable[[], None]]:
            masks = real_masks(turn, self.batch, self.grid) if fraction is None else exact_masks(fraction, turn, self.batch, self.grid)
            seen.append(masks.float().mean().item())
            found = self.ways(masks)
            return {name: found[name] for name in ("tiled", "dense")} if self.quick else found

        times = in_turn(ways, rounds, self.device)
        seen = seen[-rounds:]
        masked = (
            {
                "masked_over_tiled": ratio(times, "masked", "tiled"),
                "masked_over_tiled_range": spread(times, "masked", "tiled"),
                "reference_over_tiled": ratio(times, "reference", "tiled"),
            }
            if not self.quick
            else {}
        )
        return {
            "masks": "mixed" if fraction is None else f"{fraction:g}",
            "batch": self.batch,
            "dtype": self.dtype,
            "visible": statistics.mean(seen),
            "tiled_over_dense": ratio(times, "tiled", "dense"),
            "tiled_over_dense_range": spread(times, "tiled", "dense"),
            "tiled_over_limit": statistics.median(a / b / v for a, b, v in zip(times["tiled"], times["dense"], seen, strict=True)),
            **masked,
            "seconds": {name: statistics.median(t) for name, t in times.items()},
            "images_per_second": self.batch / statistics.median(times["tiled"]),
        }

    def stages(self, rounds: int) -> list[dict[str, Any]]:
        """Each stage alone, tiled and dense, at half of the cells: how far from the limit it is, and its share of the time."""
        found, side = [], self.images.shape[-1] // self.grid // (2 if self.net.small else 4)
        dtype = torch.bfloat16 if AUTOCAST[self.dtype] else torch.float32
        channels = self.net.conv1.out_channels
        fraction = exact_masks(0.52, 0, 1, self.grid).float().mean().item()
        for name in self.net.stage_names:
            blocks: Any = list(self.net.get_submodule(name).children())
            x = torch.rand(self.batch, channels, side * self.grid, side * self.grid, device=self.device, dtype=dtype)
            x = x.to(memory_format=torch.channels_last)

            def dense(blocks: Any = blocks, x: Tensor = x) -> Tensor:
                y = x.clone().requires_grad_()
                for block in blocks:
                    y = block(y, None)
                return y

            def tiled(visible: Tensor, blocks: Any = blocks, x: Tensor = x, side: int = side) -> Tensor:
                tiles = TileMap(Visibility(visible, self.device))
                rows = x.permute(0, 2, 3, 1).flatten(0, 2)[: tiles.count * side**2].clone().requires_grad_()
                with torch.autocast(self.device.type, enabled=False):
                    return run_blocks(blocks, rows, tiles, side)[0]

            def ways(turn: int, dense: Any = dense, tiled: Any = tiled) -> dict[str, Callable[[], None]]:
                masks = exact_masks(0.52, turn, self.batch, self.grid)
                return {"tiled": self.run(lambda: tiled(masks)), "dense": self.run(dense)}

            times = in_turn(ways, rounds, self.device)
            over = ratio(times, "tiled", "dense")
            spent = statistics.median(times["tiled"])
            found.append(
                {"stage": name, "dtype": self.dtype, "tiled_over_dense": over, "tiled_over_limit": over / fraction, "seconds": spent}
            )
            channels = blocks[-1].branch[-1][1].num_features
            side //= blocks[0].conv1.stride[0] * blocks[0].conv2.stride[0]
        return found


def dense_flops(bench: Bench) -> int:
    """Of a dense forward and backward pass, a multiplication and an addition counted as two."""
    with FlopCounterMode(display=False) as counter:
        bench.run(lambda: bench.net(bench.images))()
    return counter.get_total_flops()


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--batches", type=int, nargs="+", default=[16])
    parser.add_argument("--dtypes", choices=AUTOCAST, nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--encoder", choices=[e.name for e in EncoderName if "resnet" in e.name], default="resnet50")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--fractions", type=float, nargs="*", default=[0.25, 0.4, 0.52, 0.6, 0.8, 0.96, 1.0])
    parser.add_argument("--stages", action="store_true", help="also stage by stage")
    parser.add_argument("--quick", action="store_true", help="tiled and dense alone")
    parser.add_argument("--peak-tflops", type=float, help="of the device, to tell what share of it is reached")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    FEWEST_CELLS.clear()  # tiles are measured also where they would not be taken
    rows, stages, figures = [], [], {"threads": asked.threads, "encoder": asked.encoder, "size": asked.size}
    for dtype in asked.dtypes:
        for batch in asked.batches:
            bench = Bench(asked, batch, dtype)
            mixed = bench.measure(None, asked.rounds)
            masks = real_masks(0, batch, bench.grid)
            mixed["peak_mb"] = {name: peak_mb(do, bench.device) for name, do in bench.ways(masks).items() if name in mixed["seconds"]}
            if asked.peak_tflops:
                done = dense_flops(bench) * mixed["visible"] / mixed["seconds"]["tiled"]
                mixed["share_of_peak"] = done / 1e12 / asked.peak_tflops
            rows += [mixed, *(bench.measure(f, (asked.rounds + 1) // 2) for f in (asked.fractions if batch == asked.batches[0] else []))]
            if asked.stages and batch == asked.batches[0]:
                stages += bench.stages(asked.rounds)
    for row in rows:
        suffix = "" if row["dtype"] == "fp32" else f"_{row['dtype']}"
        if row["masks"] == "mixed" and row["batch"] == asked.batches[0]:
            figures |= {f"{key}{suffix}": row[key] for key in HEADLINE if key in row}
    figures |= {"rows": rows, "stages": stages}
    table = Table(
        "masks", "batch", "dtype", "visible", "tiled/dense", "over limit", "masked/tiled", "reference/tiled", "images/s", "peak MB"
    )
    for r in rows:
        numbers = [f"{r[key]:.3f}" for key in ("visible", "tiled_over_dense", "tiled_over_limit")]
        peak = " / ".join(f"{name} {mb:.0f}" for name, mb in r.get("peak_mb", {}).items())
        ratios = [f"{r[key]:.2f}" if key in r else "" for key in ("masked_over_tiled", "reference_over_tiled", "images_per_second")]
        table.add_row(r["masks"], str(r["batch"]), r["dtype"], *numbers, *ratios, peak)
    shares = [f"{r['dtype']}, batch {r['batch']}: {100 * r['share_of_peak']:.0f} % of the peak" for r in rows if "share_of_peak" in r]
    notes = [*shares, *(f"{s['stage']} {s['dtype']}: {s['tiled_over_limit']:.2f} x the limit, {s['seconds']:.3f} s" for s in stages)]
    publish(asked.json, asked.rounds, figures, table, [f"{asked.threads} threads, {asked.encoder}, {asked.size} px", *notes])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
