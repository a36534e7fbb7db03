"""Many short trials, to see whether each is run once: the trainer in tests/support/site_task.py, by the number of seeds.

PYTHONPATH=tests/support python tests/support/site_sweep.py --cluster test_cluster --seeds 40
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # as a script it has only its own folder on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sweeps.cli.run import main
from sweeps.spec.sweep import Configuration, Scale, SweepSpec

_SCALE = Scale(["epochs=4", "pause_seconds=0.3"], seeds=1)
SWEEP = SweepSpec(
    name="site_sweep",
    question="Does the site's Slurm run each trial once?",
    configurations=[Configuration({"lr": 0.1})],
    smoke=_SCALE,
    paper=_SCALE,
    task="site_task",
)

if __name__ == "__main__":
    main(SWEEP)
