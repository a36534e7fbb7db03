"""`python -m jobs.export RUN_DIR [FILE]`: write the target backbone of a run as safetensors."""

import argparse
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from cnnjepa.run import checkpoint
from cnnjepa.run.folder import RunFolder
from cnnjepa.run.identity import signature
from jobs.cli import Parser, exit_status, printable, require_writable
from jobs.task import task_of
from jobs.trials import run_folder


def export(run_dir: Path, target: Path) -> int:
    """Export the newest intact checkpoint; return its step, or raise ValueError without one."""
    folder = RunFolder(run_dir)
    config = folder.config()
    folder.check(None)
    require_writable(target.parent, "FILE's folder")
    found = checkpoint.newest_good(folder.checkpoints)
    if found is None:
        raise ValueError(f"a run folder must hold an intact checkpoint to export; got {run_dir}")
    tensors, about = task_of(config).export(config, checkpoint.read(found, torch.device("cpu")))
    save_file(tensors, target, metadata={"format": "pt", **about, "step": str(found.step), "signature": signature(config)})
    return found.step


def main() -> int:
    """Run the command line; return 2 if there is nothing to export."""
    text = "Export the target backbone of a run as safetensors, with the parameter names of torchvision and timm."
    example = "example:\n  python -m jobs.export runs/single/<run ID>"
    parser = Parser(prog="python -m jobs.export", description=text, epilog=example)
    what = parser.add_argument_group("what to export")
    what.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="run folder with a checkpoint, or SWEEP_FOLDER/TRIAL")
    what.add_argument("file", type=Path, metavar="FILE", nargs="?", help="file to write (default: RUN_DIR/backbone.safetensors)")
    return exit_status(lambda: run(parser.parse_args()))


def run(asked: argparse.Namespace) -> int:
    """Do what the command line asks; return 0. Raise ValueError if there is nothing to export."""
    folder = asked.run_dir if asked.run_dir.exists() else run_folder(asked.run_dir, "RUN_DIR")
    target = asked.file or folder / "backbone.safetensors"
    step = export(folder, target)
    print(printable(f"{target}: target backbone after {step} steps"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
