"""Every benchmark says what machine it ran on and prints the same figures as a table or as one JSON object."""

import json
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table


def machine() -> dict[str, Any]:
    """Processor, usable cores, GPU ("" without one) and versions: without them a time means nothing."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def publish(as_json: bool, n: int, figures: dict[str, Any], table: Table, notes: list[str]) -> None:
    """Print {"machine", "command", "n", "figures"} as one JSON object and nothing else, or `table`, the machine and `notes`."""
    here = machine()
    if as_json:
        print(json.dumps({"machine": here, "command": shlex.join(["python", *sys.argv]), "n": n, "figures": figures}))
        return
    console = Console(highlight=False)
    console.print(table)
    for line in [*notes, f"n = {n}, on " + ", ".join(f"{key} {value}" for key, value in here.items() if value)]:
        console.print(line, markup=False, soft_wrap=True)
