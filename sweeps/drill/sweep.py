"""The drill's sweep: one small pretraining on digits that `python -m jobs.drill` disturbs.

    python -m jobs.drill                    on this machine: two ranks, each with a loader process
    python -m jobs.drill --cluster komondor account=abc

It trains a ResNet of 8 channels for 200 steps, with probes, and says nothing about CNN-JEPA.
"""

from sweeps.cli.run import main
from sweeps.spec.sweep import Configuration, Scale, SweepSpec

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
    "probes.linear_paper_epochs=5",
    # The micro-batch. Its shared memory must stay below local_faults._FULL_AT_BYTES.
    "probes.feature_batch_size=8",
    "checkpoint.every_minutes=0.005",
    "log.every_steps=1",
    # On CPU a resume is bit for bit; on GPU only as far as its libraries are deterministic.
    "device=cpu",
]
_SCALE = Scale(_OVERRIDES, seeds=1)
SWEEP = SweepSpec(
    name="drill",
    question="Does a run survive whatever happens to it?",
    configurations=[Configuration({})],
    smoke=_SCALE,
    paper=_SCALE,
)

if __name__ == "__main__":
    main(SWEEP)
