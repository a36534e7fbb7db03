"""Do many trials of a second each survive? N trials of the trainer in tests/support/site_task.py.

python tests/support/many_sweep.py 12 --cluster test_cluster
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # as a script it has only its own folder on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sweeps.cli.run import main
from sweeps.spec.sweep import Configuration, Scale, SweepSpec


def sweep(trials: int) -> SweepSpec:
    """The sweep of so many learning rates."""
    scale = Scale(["epochs=2"], seeds=1)
    rates = [Configuration({"lr": round(0.01 * (1 + i), 4)}) for i in range(trials)]
    return SweepSpec("many", "Which learning rate?", configurations=rates, smoke=scale, paper=scale, task="site_task")


if __name__ == "__main__":
    count = int(sys.argv.pop(1))
    main(sweep(count))
