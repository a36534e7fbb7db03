"""Programs that forget something when they resume, and programs that do not: what the drill of a user's program must tell apart.

A bug is a program of tests/support/programs/, or this project's own trainer, with texts that occur exactly once replaced.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = Path(__file__).resolve().parent / "programs"
OWN = "cnnjepa"  # this project's own trainer, which is a package and not a file
_TRAIN, _RUN = "train.py", "training_run.py"


@dataclass(frozen=True)
class Program:
    """A program as it is planted: its base, what is replaced, and what the drill must name of it."""

    name: str
    base: str  # file of PROGRAMS, or OWN
    changes: tuple[tuple[str, str], ...]  # text, which occurs exactly once, and what takes its place
    kind: str = ""  # what it forgets; "" for a correct program
    where: str = ""  # part of the name of the variable that must be in the report
    file: str = ""  # of OWN: the file that is changed

    def write(self, folder: Path) -> str:
        """Write it into `folder`; return the module to name. Raise ValueError where a text does not occur exactly once."""
        if self.base == OWN:
            shutil.copytree(ROOT / OWN, folder / OWN, ignore=shutil.ignore_patterns("__pycache__"))
            path = folder / OWN / self.file if self.file else None
        else:
            path = folder / f"{self.base}.py"
            shutil.copyfile(PROGRAMS / path.name, path)
        if path is not None:
            text = path.read_text()
            for old, new in self.changes:
                if text.count(old) != 1:
                    raise ValueError(f"{self.name}: a text must occur exactly once; got {text.count(old)} of {old!r}")
                text = text.replace(old, new)
            path.write_text(text)
        return "cnnjepa.task" if self.base == OWN else self.base


def _drop(*lines: str) -> tuple[tuple[str, str], ...]:
    return tuple((line, "pass" if not line.startswith('"') else "") for line in lines)


_METHOD = 'self.method.load_state_dict(state["method"])'


def _keep(condition: str) -> tuple[tuple[str, str], ...]:
    """Restore what of a method's state does not meet `condition` on its name `k`, and leave the rest as it was built."""
    own = f"{{k: v for k, v in self.method.state_dict().items() if {condition}}}"
    return ((_METHOD, f'self.method.load_state_dict({{**state["method"], **{own}}})'),)


BUGS = [
    Program("AdamW's moments", "classifier", _drop('optimizer.load_state_dict(state["optimizer"])'), "optimizer", "optimizer"),
    Program(
        "AdamW saved without its state",
        "classifier",
        (
            ('"optimizer": optimizer.state_dict()', '"optimizer": optimizer.state_dict()["param_groups"]'),
            (
                'optimizer.load_state_dict(state["optimizer"])',
                'optimizer.load_state_dict({"state": {}, "param_groups": state["optimizer"]})',
            ),
        ),
        "optimizer",
        "optimizer",
    ),
    Program("the cosine schedule", "classifier", _drop('scheduler.load_state_dict(state["scheduler"])'), "scheduler", "scheduler"),
    Program("torch's random state, for dropout", "classifier", _drop('torch.set_rng_state(state["torch"])'), "torch random"),
    Program(
        "NumPy's global random state",
        "classifier",
        _drop("np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))"),
        "numpy random",
    ),
    Program("Python's global random state", "classifier", _drop("random.setstate((version, tuple(words), gauss))"), "python random"),
    Program(
        "the average of the weights",
        "classifier",
        (*_drop('average.load_state_dict(state["average"])'), ('"average": average.state_dict(),', "")),
        "EMA",
        "average",
    ),
    Program(
        "BatchNorm's buffers, since only parameters are saved",
        "classifier",
        (
            ('"model": model.state_dict(),', '"model": dict(model.named_parameters()),'),
            ('model.load_state_dict(state["model"])', 'model.load_state_dict(state["model"], strict=False)'),
        ),
        "BatchNorm buffers",
        "model",
    ),
    Program("the generator that shuffles", "classifier", _drop('order.set_state(state["order"])'), "data order", "order"),
    Program("the position of the sampler", "stream", _drop('self.stream.done = state["done"]'), "sampler position", "done"),
    Program(
        "the round of the sampler",
        "stream",
        _drop('self.stream.round = state["round"]'),
        "sampler position",
        "round",
    ),
    Program(
        "the loss scaler",
        "stream",
        (
            (
                "for name, part in self.parts().items():\n            part",
                'for name, part in self.parts().items():\n          if name != "scaler":\n            part',
            ),
        ),
        "loss scaler",
        "scaler",
    ),
    Program(
        "SGD's momentum",
        "stream",
        (
            (
                "for name, part in self.parts().items():\n            part",
                'for name, part in self.parts().items():\n          if name != "sgd":\n            part',
            ),
        ),
        "optimizer",
        "sgd",
    ),
    Program(
        "the warmup",
        "stream",
        (('"warmup": self.warmup, "scaler"', '"scaler"'),),
        "scheduler",
        "warmup",
    ),
    Program("momentum as a NumPy array", "perceptron", _drop('velocity = np.array(saved["velocity"])'), "optimizer", "velocity"),
    Program(
        "averaged weights begun from the weights",
        "perceptron",
        (('mean = np.array(saved["mean"])', "mean = weights.copy()"),),
        "EMA",
        "mean",
    ),
    Program("a NumPy generator", "perceptron", _drop('rng.bit_generator.state = saved["rng"]'), "numpy random", "rng"),
    Program("rows that were shuffled in place", "perceptron", _drop('rows = np.array(saved["rows"])'), "data order", "rows"),
    Program("the step that the rate depends on", "perceptron", _drop('steps = saved["steps"]'), "scheduler", "steps"),
    Program("a generator of Python's", "logistic", _drop("draw.setstate((version, tuple(words), gauss))"), "python random", "draw"),
    Program(
        "a rate that falls with the time",
        "logistic",
        (("config.lr / (1 + epoch)", "config.lr / (1 + epoch + 100 * (time.time() - started))"),),
        "clock",
    ),
    Program(
        "a seed from the clock",
        "logistic",
        (
            ("random.Random(config.seed)", "random.Random(int(time.time() * 1000) + config.seed)"),
            *_drop("draw.setstate((version, tuple(words), gauss))"),
        ),
        "clock",
    ),
    Program(
        "the teacher, which begins from the student",
        "teacher",
        (('begun = found["step"]', 'begun = found["step"]\n        learner.teacher.load_state_dict(learner.student.state_dict())'),),
        "EMA",
        "teacher",
    ),
    Program(
        "a schedule that starts again with the process",
        "teacher",
        (("math.pi * step / total", "math.pi * (step - begun) / total"),),
        "scheduler",
    ),
    Program("our optimiser's moments", OWN, _drop('self.optimizer.load_state_dict(state["optimizer"])'), "optimizer", "optimizer", _RUN),
    Program("our target encoder", OWN, _keep('k.startswith("target")'), "EMA", "target_encoder", _RUN),
    Program("our BatchNorms' buffers", OWN, _keep('"running" in k'), "BatchNorm buffers", "method", _RUN),
    Program(
        "our schedule, which starts again with the process",
        OWN,
        (
            ("lr = learning_rate(config.optimizer, run.step,", "lr = learning_rate(config.optimizer, run.step - begun,"),
            (
                "    run.pace.train()\n    with TrainingProgress(",
                "    begun = run.step\n    run.pace.train()\n    with TrainingProgress(",
            ),
        ),
        "scheduler",
        file=_TRAIN,
    ),
    Program(
        "our loader's position",
        OWN,
        (("views, plan, ranks, run.step, before_start", "views, plan, ranks, 0, before_start"),),
        "sampler position",
        file=_TRAIN,
    ),
]

CORRECT = [
    Program("classifier", "classifier", ()),
    Program("stream", "stream", ()),
    Program("perceptron", "perceptron", ()),
    Program("logistic, which reports seconds", "logistic", ()),
    Program("teacher", "teacher", ()),
    Program("our own trainer", OWN, ()),
    Program(
        "one that needs no random state, and saves none",
        "classifier",
        (
            ('first = state["epoch"]', 'first = state["epoch"]\n        torch.manual_seed(99)'),
            ("nn.Dropout(0.2), ", ""),
            *_drop('torch.set_rng_state(state["torch"])'),
            *_drop('"torch": torch.get_rng_state(),'),
        ),
    ),
    Program(
        "one that keeps the time that it took",
        "logistic",
        (
            ('"draw": list(draw.getstate())', '"draw": list(draw.getstate()), "spent": time.time() - started'),
            ('list(state["weights"]), state["epoch"]', 'list(state["weights"]), state["epoch"]\n        started -= state["spent"]'),
        ),
    ),
    Program(
        "one that draws by seed and epoch",
        "perceptron",
        (
            ("        rng.shuffle(rows)", "        rng = np.random.default_rng((config.seed, epoch))\n        rows = rng.permutation(150)"),
            *_drop('rows = np.array(saved["rows"])', 'rng.bit_generator.state = saved["rng"]'),
        ),
    ),
    Program(
        "one that skips what it has seen",
        "teacher",
        (("for step in range(begun, total):", "for step in range(total):\n        if step < begun:\n            continue"),),
    ),
    Program(
        "one that saves every other epoch",
        "perceptron",
        (("        run.save(\n            {", "        if epoch % 2 == 0: run.save(\n            {"),),
    ),
]
