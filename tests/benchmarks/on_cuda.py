"""What only a GPU can tell, in under 8 minutes on one: `make gpu`, to be run whenever one can be borrowed.

    python tests/benchmarks/on_cuda.py [--json] [--only PART ...] [--encoders resnet50 resnet18 resnet_small] [--budget-minutes 7.5]
                                       [--folder DIR] [--rehearse]

Without CUDA it says "not run" and why, and exits with 0; with --rehearse it does the same parts on CPU at a tiny scale, which tells
whether the script works, and nothing about a GPU. Each part runs in a process of its own: one that fails, or that no time is left for, is
reported, and the others still run. Exits with 1 where a part failed. The parts, and the figures that the JSON holds under their names:

set            a synthetic set of ImageNet's shape, packed by cnnjepa.data.pack: images, bytes_per_image, seconds, making_seconds
digits         `python -m jobs.pretrain` on digits in bf16, probes included; status 0 is asked for: steps, batch, first_loss, last_loss,
               seconds, images_per_second, settled_images_per_second and settled_data_wait_share (of the second half of the steps),
               data_wait_share, gpu_utilisation, energy_kwh, joules_per_image and watts (probes included), peak_memory_mb, linear_top1,
               nvml (why something is null)
packed         the same of a ResNet-50 in bf16 at 224 pixels on the packed set; and loader_processes
resumed        that run again, killed -9 halfway, resumed by the same command and compared with the undisturbed run: killed_at,
               resumed_at, resumes, same_bits, largest_relative and where (of the tensors of the last checkpoint), loss_apart,
               first_different_step, first_difference, twice. Different bits are a failure, except where the two already differed
               before the kill: then the device does not repeat a run, and losses must be within 5 %
ranks          torchrun with a rank a GPU against one rank, float64: ranks, backend, loss_apart (at most 1e-9), at_step; and
               group_of_one_apart, of gradient buckets through a group of one rank, which is all that a single GPU can tell of NCCL
execution      worst_apart, rows: tiled against masked execution in float64 (at most 1e-9), and whether 6 steps repeat and resume:
               see _execution.py
step           the step alone: rows of batch, dtype, encoder, size, steps, images_per_second, ms_per_step, peak_mb, reserved_mb,
               joules_per_image, watts, gpu_utilisation, not_measured; nvml
official_bf16  step.py's figures, official_style_over_fast_bf16 among them
official_fp32  step.py's figures, official_style_over_fast among them

Beside them `outcome` and `why` of the whole, `rehearsal`, `seconds`, `parts` (outcome, why, seconds and last_lines of each), and `machine`
(gpus, driver, cuda, cudnn, torch, cores, memory_gb, shared_memory_gb). What has no number, or none that is finite, is null.
"""

import argparse
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from _cuda_parts import PARTS
from _cuda_run import ROOT, Setup
from _in_parts import FAILED, NOT_RUN, PASSED, Outcome, Part, run_parts
from _report import machine, publish
from rich.console import Console
from rich.table import Table

from cnnjepa.config import EncoderName

# Seconds: with less left a part is not begun, and after the second it is ended.
LIMITS = {
    "set": (10, 90),
    "digits": (15, 100),
    "packed": (30, 160),
    "resumed": (40, 200),
    "ranks": (25, 150),
    "execution": (15, 120),
    "step": (15, 90),
    "official_bf16": (20, 100),
    "official_fp32": (20, 100),
}
NEEDS = {"packed": ("set",), "resumed": ("packed",)}
REHEARSAL_SLOWER = 10  # on a processor that others use
COLUMNS = ("features", "gradients", "statistics", "run again", "resumed")


def why_not() -> str:
    """Why there is no CUDA device; "" where there is one."""
    if torch.cuda.is_available():
        return ""
    return "torch sees no CUDA device" if torch.version.cuda else "this torch is built without CUDA"


def driver() -> str:
    """The version of NVIDIA's driver, "" where nothing tells it."""
    try:
        line = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found = subprocess.run(line, capture_output=True, text=True, timeout=30, check=False).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found[0] if found and found[0][:1].isdigit() else ""


def machine_figures() -> dict[str, Any]:
    """What it was measured on."""
    gpus = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        gpus.append({"name": p.name, "memory_gb": round(p.total_memory / 1e9, 1), "capability": f"{p.major}.{p.minor}"})
    return {
        "gpus": gpus,
        "driver": driver() if gpus else "",
        "cuda": torch.version.cuda or "",
        "cudnn": (torch.backends.cudnn.version() or 0) if gpus else 0,
        "torch": torch.__version__,
        "cores": machine()["cores"],
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "shared_memory_gb": round(shutil.disk_usage("/dev/shm").total / 1e9, 1) if Path("/dev/shm").is_dir() else 0.0,
    }


def setup_of(asked: argparse.Namespace, found: dict[str, Any]) -> Setup:
    """What the parts are given."""
    if asked.rehearse:
        return Setup("cpu", 0, found["cores"], 0.0, asked.encoders or ["resnet_small"])
    reported = asked.encoders or Setup().encoders
    return Setup("cuda", len(found["gpus"]), found["cores"], min(g["memory_gb"] for g in found["gpus"]), reported)


def parts_of(names: list[str], folder: Path, setup: Setup) -> list[Part]:
    """The parts as commands, in their order."""
    script, slower = Path(__file__).with_name("_cuda_parts.py"), REHEARSAL_SLOWER if setup.rehearsal else 1
    reported = json.dumps(dataclasses.asdict(setup))
    found = []
    for name in (n for n in PARTS if n in names):
        least, most = LIMITS[name]
        line = [sys.executable, str(script), name, str(folder), reported]
        found.append(Part(name, line, least, most * slower, NEEDS.get(name, ())))
    return found


def finite(value: Any) -> Any:
    """JSON has no infinity: null instead."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def figures_of(outcomes: dict[str, Outcome], found: dict[str, Any], rehearsal: bool, seconds: float) -> dict[str, Any]:
    """The JSON's figures: see the top of this file."""
    failed = [name for name, o in outcomes.items() if o.outcome == FAILED]
    none = not any(o.outcome == PASSED for o in outcomes.values())
    parts = {
        n: {"outcome": o.outcome, "why": o.why, "seconds": round(o.seconds, 1), "last_lines": o.last_lines} for n, o in outcomes.items()
    }
    return finite(
        {
            "outcome": FAILED if failed else NOT_RUN if none else PASSED,
            "why": f"failed: {', '.join(failed)}" if failed else "no time for any part" if none else "",
            "rehearsal": rehearsal,
            "seconds": round(seconds, 1),
            "machine": found,
            "parts": parts,
            **{name: o.figures for name, o in outcomes.items() if o.figures},
        }
    )


def tables(outcomes: dict[str, Outcome], rehearsal: bool) -> tuple[Table, Table | None]:
    """What each part showed; and tiled against masked execution in detail, where that ran."""
    title = "REHEARSAL ON CPU: whether the script works, nothing about a GPU" if rehearsal else None
    table = Table("part", "outcome", "s", "what it showed", title=title)
    for name, o in outcomes.items():
        lines = [*([f"{o.outcome.upper()}: {o.why}"] if o.why else []), *o.said, *(f"| {line}" for line in o.last_lines)]
        table.add_row(name, o.outcome, f"{o.seconds:.0f}", "\n".join(lines).replace("[", "\\["))
    rows = outcomes["execution"].figures.get("rows") if "execution" in outcomes else None
    if not rows:
        return table, None
    details = Table("encoder", "of", *COLUMNS, title="tiled against masked execution, and 6 steps repeated and resumed")
    for r in rows:
        details.add_row(r["encoder"], r["of"], *(f"{r[c]:.1e}" if c in r else "" for c in COLUMNS))
    return table, details


def measure(asked: argparse.Namespace, folder: Path, began: float) -> dict[str, Any]:
    """Run the parts and print what they showed; returns the figures."""
    found = machine_figures()
    setup = setup_of(asked, found)

    def say(name: str) -> None:
        print(f"{time.monotonic() - began:5.0f} s  {name}", file=sys.stderr, flush=True)

    # The same code in all processes: that of this checkout.
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))}
    deadline = began + 60 * asked.budget_minutes
    outcomes = run_parts(parts_of(asked.only, folder, setup), folder, deadline, ROOT, say, environment)
    figures = figures_of(outcomes, found, setup.rehearsal, time.monotonic() - began)
    table, details = tables(outcomes, setup.rehearsal)
    if details is not None and not asked.json:
        Console(highlight=False).print(details)
    gpus = ", ".join(f"{g['name']} of {g['memory_gb']} GB" for g in found["gpus"]) or "no GPU"
    what = f"driver {found['driver'] or '?'}, CUDA {found['cuda'] or 'none'}, {found['cores']} cores, {found['memory_gb']} GB of memory"
    closing = [f"{figures['outcome']} in {figures['seconds']:.0f} s{': ' if figures['why'] else ''}{figures['why']}", f"{gpus}; {what}"]
    publish(asked.json, 1, figures, table, closing)
    return figures


def main() -> int:
    """Measure and print."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS), help="these parts; packed needs set, and resumed both")
    names = [e.name for e in EncoderName if "resnet" in e.name]
    parser.add_argument("--encoders", choices=names, nargs="+", help="of the part execution")
    parser.add_argument("--budget-minutes", type=float, default=7.5)
    parser.add_argument("--folder", type=Path, help="a new or empty folder to work in, which is kept; default: one that is removed")
    parser.add_argument("--rehearse", action="store_true", help="the same parts on CPU at a tiny scale")
    asked = parser.parse_args()
    if (why := why_not()) and not asked.rehearse:
        line = f"not run: {why}"
        figures = {"outcome": NOT_RUN, "why": why, "rehearsal": False, "parts": {}}
        print(json.dumps({"machine": machine(), "command": " ".join(sys.argv), "n": 0, "figures": figures}) if asked.json else line)
        return 0
    with tempfile.TemporaryDirectory(prefix="on-cuda-") as temporary:
        folder = asked.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            parser.error(f"--folder must be new or empty; got {folder}")
        return int(measure(asked, folder.resolve(), began)["outcome"] == FAILED)


if __name__ == "__main__":
    raise SystemExit(main())
