"""Does a run come through whatever happens to it? One small pretraining of digits, which `python -m jobs.drill` strikes on its way.

python -m jobs.drill                               on this machine: two ranks, each with a process that loads images
python -m jobs.drill --cluster komondor account=abc

200 steps of a ResNet of 8 channels, probed on the way; it says nothing about CNN-JEPA.
"""

from sweeps.cli.run import main
from sweeps.spec.sweep import Scale, Setting, SweepSpec

_OVERRIDES = [
    "data.train_limit=160",
    "data.test_limit=60",
    "data.workers=1",
    "encoder.width=8",
    "epochs=40",
    "optimizer.warmup_epochs=1",
    "optimizer.lr=0.002",
    "global_batch_size=32",
    "micro_batch_size=8",
    "probes.every_epochs=8",
    "probes.linear_epochs=5",
    "probes.batch_size=8",  # as the micro-batch: less than sweeps/drill/local_faults.py calls a full disk, for shared memory is none
    "checkpoint.every_minutes=0.005",
    "log.every_steps=1",
    "device=cpu",  # where a resume is bit for bit; on a GPU it is as far as its libraries are deterministic
]
_SCALE = Scale(_OVERRIDES, seeds=1)
SWEEP = SweepSpec(
    name="drill",
    question="Does a run come through whatever happens to it?",
    settings=[Setting({})],
    smoke=_SCALE,
    paper=_SCALE,
)

if __name__ == "__main__":
    main(SWEEP)
