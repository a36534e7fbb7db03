"""`python -m jobs.stage`: list or remove the packed sets that are staged on this node."""

import argparse
import fcntl
import os
import shutil
import sys
from pathlib import Path

from jobs.cli import Parser, begun, exit_status
from jobs.staging import StagingError, own_folder, try_lock


def _line(folder: Path, key: str) -> str:
    size = sum(p.stat().st_size for part in (key, f"{key}.partial") for p in (folder / part).rglob("*") if p.is_file())
    lock = try_lock(folder / f"{key}.lock", fcntl.LOCK_EX)
    if lock is not None:
        os.close(lock)
    what = "complete" if (folder / key).exists() else "partial"
    return f"{key}  {size / 1e9:8.2f} GB  {what}, {'in use' if lock is None else 'not in use'}"


def free(folder: Path, key: str) -> bool:
    """Remove one set; return False, changing nothing, if a run reads or copies it."""
    lock = try_lock(folder / f"{key}.lock", fcntl.LOCK_EX)
    if lock is None:
        return False
    try:
        for path in (folder / key, folder / f"{key}.partial"):
            if path.exists():
                shutil.rmtree(path)
    finally:
        os.close(lock)  # keep the lock file: a waiting process has it open
    return True


def main() -> int:
    """Run the command line; return 0 when done, 1 if a set is in use, 2 on wrong usage."""
    text = """List or remove the data sets that are staged on this node. A set that a run reads is never removed.

FOLDER is the profile's local_scratch. It belongs to one node: on a cluster, run the command there."""
    example = "example:\n  srun -w NODE python -m jobs.stage --list /tmp"
    parser = Parser(prog="python -m jobs.stage", description=text, epilog=example)
    action = parser.add_argument_group("what to do, one of").add_mutually_exclusive_group(required=True)
    action.add_argument("--list", metavar="FOLDER", help="print key, size and state of each set")
    action.add_argument("--free", metavar="FOLDER", help="remove sets that no run reads")
    parser.add_argument_group("which sets").add_argument("keys", nargs="*", metavar="KEY", help="keys that --list prints (default: all)")
    return exit_status(lambda: run(parser.parse_args()))


def run(asked: argparse.Namespace) -> int:
    """List or remove sets; return the exit status. Raise ValueError or StagingError at wrong usage."""
    folder = own_folder(asked.list or asked.free)
    there = sorted({p.name.removesuffix(".partial") for p in folder.iterdir() if p.is_dir()})  # complete and unfinished sets
    if unknown := sorted(set(asked.keys) - set(there)):
        raise StagingError(f"KEY must be a set in {folder} ({', '.join(there) or 'which is empty'}); got {unknown[0]}")
    begun()
    used = 0
    for key in asked.keys or there:
        if asked.list:
            print(_line(folder, key))
        elif free(folder, key):
            print(f"{key} removed")
        else:
            used += 1
            print(f"{key} is in use: not removed")
    return 1 if used else 0


if __name__ == "__main__":
    sys.exit(main())
