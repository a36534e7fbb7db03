"""What SparK's step costs with the encoder on tiles and with masked execution: ResNet-50, 224 pixels, the same images, one process.

    python tests/benchmarks/spark.py [--json] [--rounds 5] [--batch 8] [--precision fp32|bf16] [--threads 1]

The encoder's part is the forward pass to the features of all four stages and the backward pass from them; the step is the trainer's, with
the decoder, whose width is the published 512, and LAMB. Each round runs all four in turn, in an order that turns by one, on the masks of a
new step; the first round warms up and does not count. `encoder_masked_over_tiled` and `step_masked_over_tiled` are medians of the rounds'
ratios, of processor seconds on one CPU thread. Status 1 if the encoder gains less than REQUIRED, or if the two losses differ.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from _report import publish
from _turns import AUTOCAST, in_turn, ratio, spread
from methods import build, pixels, settings, take_step
from rich.table import Table

from cnnjepa.config import Execution, Precision
from cnnjepa.monitoring.memory import peak_memory_mb
from cnnjepa.run.ranks import joined
from cnnjepa.train import micro_batch
from cnnjepa.training_run import Run

REQUIRED = 2.0


def encode(run: Run, loaded: Any) -> None:
    """Features of all stages, and gradients of all the encoder's weights from a loss that reads each of them."""
    batch = micro_batch(run, loaded, 0)
    autocast = torch.autocast(run.ranks.device.type, torch.bfloat16, enabled=run.config.precision is Precision.bf16)
    with autocast:
        stages = run.method.encoder.stage_features(batch.views[0], run.method.visibility(batch))
    torch.stack([features.float().square().mean() for features in stages]).sum().backward()
    run.method.encoder.zero_grad()


def loss_of(run: Run, loaded: Any, execution: Execution) -> float:
    """The loss of the step that comes next; the weights stay."""
    run.method.encoder.execution = execution
    with torch.no_grad():
        return float(run.method(micro_batch(run, loaded, 0))["loss"])


def measure(args: argparse.Namespace) -> tuple[dict[str, list[float]], float, float]:
    """Seconds of each way in each round, the relative difference of the two losses, and the peak memory in MiB."""
    config = settings("spark", args.batch, Precision[args.precision], args.threads)
    with joined(config.device) as ranks:
        run = build(config, ranks, args.batch)
        loaded = pixels(run.method.views(config), args.batch)
        tiled, masked = (loss_of(run, loaded, execution) for execution in (Execution.tiled, Execution.masked))

        def way(do: Callable[[Run, Any], None], execution: Execution) -> Callable[[], None]:
            def both() -> None:
                run.method.encoder.execution = execution
                do(run, loaded)

            return both

        ways = {
            f"{part} {execution.name}": way(do, execution)
            for part, do in (("encoder", encode), ("step", take_step))
            for execution in (Execution.tiled, Execution.masked)
        }
        return in_turn(lambda _: ways, args.rounds, ranks.device), abs(tiled - masked) / abs(masked), peak_memory_mb(ranks)


def main() -> int:
    """Measure and print; the exit status."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rounds", type=int, default=5, help="that count (5)")
    parser.add_argument("--batch", type=int, default=8, help="images a step (8)")
    parser.add_argument("--precision", choices=AUTOCAST, default="fp32")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    args = parser.parse_args()
    if args.rounds < 1 or args.batch < 2 or args.threads < 1:
        parser.error(f"--rounds and --threads must be at least 1, --batch 2; got {args.rounds}, {args.threads} and {args.batch}")
    torch.set_num_threads(args.threads)
    seconds, difference, peak = measure(args)
    figures: dict[str, Any] = {"batch": args.batch, "precision": args.precision, "threads": args.threads}
    table = Table("part", "tiled, s", "masked, s", "masked / tiled", "smallest to largest", title="SparK, one training step")
    for part in ("encoder", "step"):
        tiled, masked = f"{part} tiled", f"{part} masked"
        times, (low, high) = ratio(seconds, masked, tiled), spread(seconds, masked, tiled)
        middles = [f"{statistics.median(seconds[way]):.2f}" for way in (tiled, masked)]
        table.add_row(part, *middles, f"{times:.2f}", f"{low:.2f} to {high:.2f}")
        figures |= {f"{part}_masked_over_tiled": times, f"{part}_masked_over_tiled_range": [low, high]}
        figures |= {f"seconds_{part}_tiled": seconds[tiled], f"seconds_{part}_masked": seconds[masked]}
    figures |= {"encoder_share_of_step_tiled": ratio(seconds, "encoder tiled", "step tiled")}
    figures |= {"loss_difference": difference, "peak_memory_mb": peak}
    same = difference < (1e-2 if args.precision == "bf16" else 1e-4)
    missed = [f"MISSED: the losses differ by {difference:.1e} of theirs"] * (not same)
    gained = figures["encoder_masked_over_tiled"]
    missed += [f"MISSED: the encoder's part is {gained:.2f} times as fast on tiles; required: {REQUIRED:g}"] * (gained < REQUIRED)
    share = figures["encoder_share_of_step_tiled"]
    notes = [
        f"batch {args.batch}, {args.precision}, {args.threads} threads; on tiles the encoder's part is {share:.0%} of the step",
        *missed,
    ]
    publish(args.json, args.rounds, figures, table, notes)
    if args.json and missed:
        print("\n".join(missed), file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
