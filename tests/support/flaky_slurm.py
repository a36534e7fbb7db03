"""A client of Slurm that fails as sites' clients do, drawn by a seed: FLAKY_SEED and the number of the call decide; FLAKY_LOG counts them.

Copied as squeue, sbatch, scontrol, sacct, sacctmgr and scancel into a folder at the front of PATH; the real ones are in FLAKY_REAL.
"""

import fcntl
import os
import random
import subprocess
import sys
import time

SHARE = 0.3  # of all calls
BANNER = "\n   Welcome to the cluster\n\n--> Verifying valid submit host (login2)...OK\n--> Enforcing max jobs per user...OK\nAvis : é |\n"
FOREIGN = "erreur : le contrôleur a répondu de façon inattendue"
ABSENT = "error: Unable to contact slurm controller (connect failure)"
LOST = "error: Socket timed out on send/recv operation"
KINDS = ("absent", "late", "empty", "foreign", "banner", "lost")
COMMANDS = ("squeue", "sbatch", "scontrol", "sacct", "sacctmgr", "scancel")


def kind_of(seed: str, number: int) -> str:
    """Return what befalls the call of that number, "" if nothing does."""
    draw = random.Random(f"{seed} {number}")
    return draw.choice(KINDS) if draw.random() < SHARE else ""


def number_of_this_call(path: str, line: str) -> int:
    """Append the line to the log; return its number."""
    with open(path, "a+") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        log.seek(0)
        number = sum(1 for _ in log)
        log.write(line + "\n")
    return number


def main() -> int:
    name, words = os.path.basename(sys.argv[0]), sys.argv[1:]
    number = number_of_this_call(os.environ["FLAKY_LOG"], " ".join([name, *words])[:200])
    kind = kind_of(os.environ["FLAKY_SEED"], number)
    if kind in ("absent", "foreign"):
        print(f"{name}: {ABSENT if kind == 'absent' else FOREIGN}", file=sys.stderr)
        return 1
    if kind == "late":
        time.sleep(2)
    if kind == "empty" and name in ("squeue", "sacct", "sacctmgr"):
        return 0
    if kind == "banner":
        print(BANNER, flush=True)
        print(f"{name}: warning: maintenance on Sunday", file=sys.stderr, flush=True)
    quiet = subprocess.DEVNULL if kind == "empty" else None
    done = subprocess.run([os.path.join(os.environ["FLAKY_REAL"], name), *words], stdout=quiet, check=False)
    if kind == "lost" and name in ("sbatch", "scontrol", "scancel"):
        print(f"{name}: {LOST}", file=sys.stderr)
        return 1
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
