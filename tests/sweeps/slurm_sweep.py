"""Do jobs survive? Settings that train for some seconds on 4 ranks, long enough to be struck in the middle.

python tests/sweeps/slurm_sweep.py [one|two] --cluster test_cluster
"""

import sys

from sweeps.command import main
from sweeps.spec import Scale, Setting, SweepSpec

OVERRIDES = [
    "data.train_limit=200",
    "data.test_limit=60",
    "encoder.width=8",
    "epochs=40",
    "optimizer.warmup_epochs=1",
    "global_batch_size=32",
    "micro_batch_size=8",
    "probes.linear_epochs=3",
    "checkpoint.every_minutes=0.05",
    "log.every_steps=1",
    "log.tensorboard=false",
]
SIZES = {"one": 1, "two": 2}


def sweep(settings: int = 3) -> SweepSpec:
    """The sweep with its first settings."""
    chosen = [Setting(f"depth {depth}", {"method.predictor.depth": depth}) for depth in range(1, settings + 1)]
    scale = Scale(OVERRIDES, seeds=1)
    return SweepSpec("slurm_sweep", "Do jobs survive?", settings=chosen, smoke=scale, paper=scale)


if __name__ == "__main__":
    size = SIZES.get(sys.argv[1], 3)
    sys.argv[1:] = [a for a in sys.argv[1:] if a not in SIZES]
    main(sweep(size))
