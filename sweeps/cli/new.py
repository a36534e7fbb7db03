"""Command `python -m sweeps new NAME`: write a sweep's file to start from, which learns on this machine as it stands."""

import importlib.util
import keyword
import shlex
from pathlib import Path

from jobs.cli import printable

_TEXT = '''"""Which learning rate? Put your own question here, and what you expect, before you run it.

{command} --cluster local --dry-run      lists the runs; starts none
{command} --cluster local                6 runs of half a minute
{command} --cluster local --seeds 3      later: adds a seed to each; what is there is kept
"""

from sweeps import Configuration, Scale, SweepSpec, main

# What all runs have in common. Every key is in cnnjepa/config.py, with its default and its unit; these come as
# key=value on the command line too, as in `{command} --cluster local epochs=20`.
SMALL = [
    "data=digits",  # 1,797 images of 10 classes that come with scikit-learn. Your own: data=imagefolder data.root=/folder
    "encoder.name=resnet_small",  # for images of up to 96 pixels; resnet18 or resnet50 for larger ones
    "epochs=4",
    "optimizer.warmup_epochs=1",
    "global_batch_size=32",  # images of a step
    "micro_batch_size=32",  # images at once: less if the memory does not hold them
    "method.ema.momentum_start=0.9",  # a short run needs a target that follows faster than the default 0.996
]
# The same at full scale, on a GPU or a cluster: --scale paper, or --cluster PROFILE.
LARGE = ["data=imagenet100", "encoder.name=resnet50", "precision=bf16", "epochs=200"]

SWEEP = SweepSpec(
    question="Which learning rate?",
    # One for each run that you want to compare; each names the keys that it changes. What they change names them in tables.
    configurations=[
        Configuration({{"optimizer.lr": 0.003}}),
        Configuration({{"optimizer.lr": 0.01}}),
        Configuration({{"optimizer.lr": 0.03}}),
    ],
    # To let the sweep choose instead, import real from sweeps and give in their place
    #     space=[real("optimizer.lr", 0.001, 0.1, log=True)],
    # and max_trials=12 to both scales.
    smoke=Scale(SMALL, seeds=2),  # on one seed, a difference says nothing
    paper=Scale(LARGE, seeds=3),
    # Configurations are ranked by linear.holdout_top1, on labels held out of the training set: objective= names another score.
)

if __name__ == "__main__":
    main(SWEEP)
'''


def new(named: str) -> int:
    """Write NAME.py and print what to type next; return the exit status. Raise ValueError if the file is there or its name will not do."""
    path = Path(named if named.endswith(".py") else f"{named}.py")
    name = path.stem
    if not name.isidentifier() or keyword.iskeyword(name):
        raise ValueError(f"NAME must be letters, digits and _, not beginning with a digit; got {named}: write it as in my_question")
    if not path.parent.is_dir():
        raise ValueError(f"NAME must lie in a folder that is there; got {named}: make {path.parent} first")
    if not path.exists() and importlib.util.find_spec(name) is not None:
        raise ValueError(f"NAME must be no module's, which the file would hide; got {named}: choose another")
    command = f"python -m sweeps run {shlex.quote(str(path))}"
    try:
        with open(path, "x") as file:
            file.write(_TEXT.format(command=command))
    except FileExistsError as error:
        raise ValueError(f"NAME must be new; got {named}, and {path} is there: choose another name, or edit that file") from error
    print(printable(f"{path}: a sweep that learns as it stands; put your question in it\n{command} --cluster local --dry-run", keep="\n"))
    return 0
