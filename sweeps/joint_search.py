"""Which momentum, learning rate, mask and predictor together? The other sweeps' questions at once.

python sweeps/joint_search.py --cluster local                   16 configurations: 5 min, two cores
python sweeps/joint_search.py --cluster komondor account=abc --budget-gpu-hours 1500
python sweeps/joint_search.py --cluster local --two-objectives  accuracy and GPU-hours

Trial 0 is the paper's. At paper scale, 40 configurations take at most 52 GPU-hours each.
"""

from sweeps.cli.run import main
from sweeps.spec.scales import PAPER, SMOKE
from sweeps.spec.space import choice, real, whole
from sweeps.spec.sweep import Scale, SweepSpec

SWEEP = SweepSpec(
    name="joint_search",
    question="Which momentum, learning rate, mask and predictor together?",
    space=[
        real("optimizer.lr", 0.0003, 0.03, 0.001, 0.003, 0.01, log=True),
        real("method.ema.momentum_start", 0.9, 0.9999, 0.97, 0.996),
        choice("method.mask.strategy", "mixed", "multi_block", "random"),
        real("method.mask.mask_ratio", 0.3, 0.9, 0.45, 0.6, 0.75, when=("method.mask.strategy", ("mixed", "random"))),
        whole("method.mask.blocks", 1, 6, 2, 4, when=("method.mask.strategy", ("mixed", "multi_block"))),
        choice("method.predictor.conv", "depthwise", "dense", "pointwise"),
        whole("method.predictor.depth", 1, 4, 1, 3),
        choice("method.predictor.kernel", 3, 5, when=("method.predictor.conv", ("depthwise", "dense"))),
    ],
    smoke=Scale(SMOKE, seeds=2, max_trials=16),
    paper=Scale(PAPER, seeds=3, max_trials=40),
)

if __name__ == "__main__":
    main(SWEEP)
