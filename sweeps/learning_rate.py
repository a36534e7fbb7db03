"""Which learning rate, weight decay and warm-up?

python sweeps/learning_rate.py --cluster local                 12 configurations: 3 min on two cores
python sweeps/learning_rate.py --cluster komondor account=abc  24 configurations of <= 52 GPU-hours

Trial 0 is the paper's: 0.01, 0.01 and 10 epochs, not scaled with the batch of 512.
"""

from sweeps.cli.run import main
from sweeps.spec.scales import PAPER, SMOKE
from sweeps.spec.space import choice, real
from sweeps.spec.sweep import Scale, SweepSpec

SWEEP = SweepSpec(
    name="learning_rate",
    question="Which learning rate, weight decay and warm-up?",
    space=[
        real("optimizer.lr", 0.0003, 0.03, 0.001, 0.003, 0.01, 0.03, log=True),
        real("optimizer.weight_decay", 0.0001, 0.1, 0.001, 0.01, 0.1, log=True),
        choice("optimizer.warmup_epochs", 5, 10, 20, 40),
    ],
    smoke=Scale(SMOKE, seeds=2, max_trials=12, space=[choice("optimizer.warmup_epochs", 1, 2)]),
    paper=Scale(PAPER, seeds=3, max_trials=24),
)

if __name__ == "__main__":
    main(SWEEP)
