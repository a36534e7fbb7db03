"""Do jobs survive? Settings that train for seconds on some ranks; tests/support/held_rank.py holds them in the middle.

python tests/support/slurm_sweep.py [one|two|vicreg] --cluster test_cluster
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # as a script it has only its own folder on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sweeps.cli.run import main
from sweeps.spec.sweep import Configuration, Scale, SweepSpec
from tests.support import tiny

# 6 steps an epoch. A checkpoint is due at almost each step: a kill -9 in the middle finds one.
OVERRIDES = [
    *tiny.OVERRIDES,
    "data.train_limit=100",
    "epochs=5",
    "global_batch_size=16",
    "micro_batch_size=8",
    "checkpoint.every_minutes=0.001",
]
DEPTHS = [Configuration({"method.predictor.depth": depth}) for depth in (1, 2, 3)]
# Its loss and its BatchNorm need all ranks in every step.
VICREG = Configuration({"method": "vicreg", "method.width": 64, "encoder.sync_bn": True, "encoder.blocks": 1})
CHOICES = {"one": DEPTHS[:1], "two": DEPTHS[:2], "vicreg": [VICREG]}


def sweep(configurations: list[Configuration]) -> SweepSpec:
    """The sweep with those configurations."""
    scale = Scale(OVERRIDES, seeds=1)
    return SweepSpec("slurm_sweep", "Do jobs survive?", configurations=configurations, smoke=scale, paper=scale)


if __name__ == "__main__":
    chosen = CHOICES.get(sys.argv[1], DEPTHS)
    sys.argv[1:] = [a for a in sys.argv[1:] if a not in CHOICES]
    main(sweep(chosen))
