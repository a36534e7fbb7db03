"""Which learning rate and depth? A search of seconds.

python tests/support/tiny_search.py --cluster local
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # as a script it has only its own folder on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sweeps.cli.run import main
from sweeps.spec.space import choice, real, whole
from sweeps.spec.sweep import Scale, SweepSpec
from tests.support.tiny import OVERRIDES

SPACE = [
    real("optimizer.lr", 0.0005, 0.05, 0.001, 0.01, log=True),
    choice("method.predictor.conv", "depthwise", "pointwise"),
    choice("method.predictor.kernel", 3, 5, when=("method.predictor.conv", ("depthwise",))),
    whole("method.predictor.depth", 1, 3),
]
# So many held-out images that few configurations score the same at a rung.
SCALE = Scale([*OVERRIDES, "data.train_limit=400", "data.holdout_fraction=0.4", "probes.linear_paper_epochs=30"], seeds=2, max_trials=8)
SWEEP = SweepSpec("tiny_search", "Which learning rate and depth?", space=SPACE, smoke=SCALE, paper=SCALE)

if __name__ == "__main__":
    main(SWEEP)
