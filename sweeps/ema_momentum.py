"""How fast should the target encoder follow? Start, end and schedule of its momentum.

python sweeps/ema_momentum.py --cluster local                 10 configurations: 3 min on two cores
python sweeps/ema_momentum.py --cluster komondor account=abc  24 configurations of <= 52 GPU-hours

Trial 0 is the paper's: cosine from 0.996 to 1. Early stopping spends about a third of these hours.
A smoke run's 200 steps favour a low start, which says nothing about the paper's 49,000 steps.
"""

from sweeps.cli.run import main
from sweeps.spec.scales import PAPER, SMOKE
from sweeps.spec.space import choice, real
from sweeps.spec.sweep import Scale, SweepSpec

SWEEP = SweepSpec(
    name="ema_momentum",
    question="How fast should the target encoder follow the context encoder?",
    space=[
        real("method.ema.momentum_start", 0.9, 0.9999, 0.97, 0.99, 0.996, 0.999),
        choice("method.ema.schedule", "cosine", "linear", "constant"),
        real("method.ema.momentum_end", 0.99, 1.0, 0.999, 1.0, when=("method.ema.schedule", ("cosine", "linear"))),
    ],
    smoke=Scale(SMOKE, seeds=2, max_trials=10),
    paper=Scale(PAPER, seeds=3, max_trials=24),
)

if __name__ == "__main__":
    main(SWEEP)
