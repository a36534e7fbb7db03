"""Which learning rate and decay for softmax regression on digits, searched with rungs?"""

from sweeps.cli.run import main
from sweeps.spec.space import real
from sweeps.spec.sweep import Scale, SweepSpec

_SCALE = Scale(["epochs=8"], seeds=1, max_trials=5)
SWEEP = SweepSpec(
    name="softmax_search",
    question="Which learning rate and decay for softmax regression?",
    space=[real("lr", 0.0001, 3.0, 0.1, log=True), real("decay", 0.0, 0.1, 0.0)],
    smoke=_SCALE,
    paper=_SCALE,
    task="softmax_task",
)

if __name__ == "__main__":
    main(SWEEP)
