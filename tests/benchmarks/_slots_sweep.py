"""A sweep of trivial trials, one a seed: a single step of a very small network, no probe."""

from sweeps.cli.run import main
from sweeps.spec.sweep import Configuration, Scale, SweepSpec

OVERRIDES = [
    "data=imagefolder",
    "data.image_size=32",
    "encoder.width=4",
    "epochs=1",
    "optimizer.warmup_epochs=0",
    "global_batch_size=8",
    "micro_batch_size=8",
    "probes.names=[]",
    "checkpoint.every_minutes=1000",
    "log.tensorboard=false",
]
SWEEP = SweepSpec(
    name="slots",
    question="What does a worker cost?",
    configurations=[Configuration({"method.predictor.depth": 1})],
    smoke=Scale(OVERRIDES, seeds=1),
    paper=Scale(OVERRIDES, seeds=1),
)

if __name__ == "__main__":
    main(SWEEP)
