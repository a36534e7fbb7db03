"""Does depth matter at all? Three configurations of seconds, one of which diverges when it is asked to.

python tests/support/tiny_sweep.py --cluster local
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # as a script it has only its own folder on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sweeps.cli.run import main
from sweeps.spec.sweep import Configuration, Scale, SweepSpec
from tests.support.tiny import OVERRIDES

CONFIGURATIONS = [
    Configuration({"method.predictor.depth": 1}, {"linear.test_top1": 64.86}),
    Configuration({"method.predictor.depth": 2}, {"linear.test_top1": 73.22}),
    Configuration({"method.predictor.conv": "pointwise"}),
]


def sweep(diverging: bool = False) -> SweepSpec:
    """The sweep; with `diverging`, a fourth configuration whose loss is not finite."""
    more = [Configuration({"optimizer.lr": 1e30})] if diverging else []
    scale = Scale(OVERRIDES, seeds=2)
    return SweepSpec("tiny_sweep", "Does depth matter at all?", configurations=[*CONFIGURATIONS, *more], smoke=scale, paper=scale)


if __name__ == "__main__":
    diverging = "diverging" in sys.argv
    sys.argv = [a for a in sys.argv if a != "diverging"]
    main(sweep(diverging))
