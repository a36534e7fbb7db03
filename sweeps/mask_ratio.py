"""Which cells should be hidden: random ones, blocks or both? How many, and in which blocks?

python sweeps/mask_ratio.py --cluster local                 12 configurations: 3 min on two cores
python sweeps/mask_ratio.py --cluster komondor account=abc  24 configurations of <= 52 GPU-hours

Trial 0 is the paper's (section III-B). Its linear and k-NN top-1 with one seed: mixed 73.26, 56.26;
multi-block 73.02, 55.62; random 57.64, 36.64.
"""

from sweeps.cli.run import main
from sweeps.spec.scales import PAPER, SMOKE
from sweeps.spec.space import choice, real, whole
from sweeps.spec.sweep import Scale, SweepSpec

SWEEP = SweepSpec(
    name="mask_ratio",
    question="Which cells should be hidden from the context encoder, and how many?",
    space=[
        choice("method.mask.strategy", "mixed", "multi_block", "random"),
        real("method.mask.mask_ratio", 0.3, 0.9, 0.45, 0.6, 0.75, when=("method.mask.strategy", ("mixed", "random"))),
        whole("method.mask.blocks", 1, 6, 2, 4, 6, when=("method.mask.strategy", ("mixed", "multi_block"))),
        real("method.mask.block_scale_min", 0.05, 0.2, 0.1, 0.15, when=("method.mask.strategy", ("mixed", "multi_block"))),
        real("method.mask.block_scale_max", 0.2, 0.4, 0.2, 0.3, when=("method.mask.strategy", ("mixed", "multi_block"))),
    ],
    smoke=Scale(SMOKE, seeds=2, max_trials=12),
    paper=Scale(PAPER, seeds=3, max_trials=24),
)

if __name__ == "__main__":
    main(SWEEP)
