"""Which learning rate for softmax regression on digits? A sweep of another trainer than CNN-JEPA."""

from sweeps.cli.run import main
from sweeps.spec.sweep import Configuration, Scale, SweepSpec

_SCALE = Scale([], seeds=2)
SWEEP = SweepSpec(
    name="softmax",
    question="Which learning rate for softmax regression?",
    configurations=[Configuration({"lr": 0.003}), Configuration({"lr": 0.1})],
    smoke=_SCALE,
    paper=_SCALE,
    task="softmax_task",
)

if __name__ == "__main__":
    main(SWEEP)
