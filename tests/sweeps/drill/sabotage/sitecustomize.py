"""Breaks the drill's run on purpose, where a test has put this folder on PYTHONPATH: Python runs such a file at its start.

DRILL_SABOTAGE says what a resumed run forgets. Only the stage of a drill is touched; nothing of the project knows of it.
"""

import os
import sys

if "sweeps.drill.stage" in sys.orig_argv:
    import torch

    import cnnjepa.methods.cnn_jepa
    import cnnjepa.train

    what = os.environ["DRILL_SABOTAGE"]
    if what == "moments":
        torch.optim.Optimizer.load_state_dict = lambda self, state: None  # type: ignore[method-assign, assignment]
    elif what == "sampler":
        honest_loader = cnnjepa.train.train_loader

        def from_the_start(config, splits, specs, plan, ranks, start_step, **more):  # type: ignore[no-untyped-def]
            return honest_loader(config, splits, specs, plan, ranks, 0, **more)

        cnnjepa.train.train_loader = from_the_start
    elif what == "rng":
        honest_restore, honest_generator, resumes = cnnjepa.train.Run.restore, cnnjepa.masking.generator, [0]

        def restore(self, state):  # type: ignore[no-untyped-def]
            honest_restore(self, state)
            resumes[0] += 1

        def generator(seed, stream, *key):  # type: ignore[no-untyped-def]
            return honest_generator(seed + resumes[0], stream, *key)

        cnnjepa.train.Run.restore = restore  # type: ignore[method-assign]
        cnnjepa.masking.generator = generator
    else:
        raise ValueError(f"DRILL_SABOTAGE must be moments, sampler or rng; got {what}")
