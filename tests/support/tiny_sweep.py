"""Does depth matter at all? Three settings of seconds, one of which diverges when it is asked to.

python tests/support/tiny_sweep.py --cluster local
"""

import sys

from sweeps.cli.run import main
from sweeps.spec.sweep import Scale, Setting, SweepSpec

SETTINGS = [
    Setting({"method.predictor.depth": 1}, {"linear.test_top1": 64.86}),
    Setting({"method.predictor.depth": 2}, {"linear.test_top1": 73.22}),
    Setting({"method.predictor.conv": "pointwise"}),
]
OVERRIDES = [
    "data.train_limit=160",
    "data.test_limit=60",
    "encoder.width=8",
    "epochs=4",
    "optimizer.warmup_epochs=0.5",
    "global_batch_size=32",
    "micro_batch_size=16",
    "probes.linear_epochs=5",
    "checkpoint.every_minutes=0",
    "log.every_steps=1",
    "log.tensorboard=false",
]


def sweep(diverging: bool = False) -> SweepSpec:
    """The sweep; with `diverging`, a fourth setting whose loss is not finite."""
    more = [Setting({"optimizer.lr": 1e30})] if diverging else []
    scale = Scale(OVERRIDES, seeds=2)
    return SweepSpec("tiny_sweep", "Does depth matter at all?", settings=[*SETTINGS, *more], smoke=scale, paper=scale)


if __name__ == "__main__":
    diverging = "diverging" in sys.argv
    sys.argv = [a for a in sys.argv if a != "diverging"]
    main(sweep(diverging))
