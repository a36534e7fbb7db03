"""What a trainer brings for its runs to be swept, resumed and reported. CNN-JEPA and its baselines are cnnjepa/task.py, the default.

A task is a module with a dataclass `Config` and a function `train`. Whatever else of `Task` the module defines under the same name takes
the place of what stands here, so that a plain function needs none of it. cnnjepa/run/ holds all that a trainer writes into a run folder.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cnnjepa.run.folder import EarlyWarning, RunFolder, RunResult
from cnnjepa.run.identity import config_class, lookup, task_module, task_name
from cnnjepa.run.losses import LossCurve

Judge = Callable[[int, dict[str, float]], str]
Probes = Mapping[str, Mapping[str, float]]


class Task:
    """One trainer as the launcher sees it."""

    Config: type  # a dataclass with `seed` and `epochs`; fields whose metadata has `neutral` cannot change a result
    # Runs a configuration to its end and returns its result, or None where it was asked to stop and has saved: see cnnjepa/train.py.
    train: Callable[[Any, RunFolder, Callable[[], bool], int, Judge], RunResult | None]
    # Where the configuration keeps what the launcher sets or reads, as dotted keys: threads, device (a Device), data, data_root (a folder),
    # workers (loader processes), batch (images a step) and warmup_epochs. What has no key is left alone.
    KEYS: Mapping[str, str] = {}
    DEFAULTS: Sequence[Any] = ("_self_",)  # Hydra's defaults list, which the cluster follows
    RENAMED: Mapping[str, str] = {}  # old key: new key; files with the old one still open
    OBJECTIVE: str = ""  # the metric that ranks configurations unless a sweep names another
    HEADLINE: Sequence[str] = ()  # the metrics that a sweep shows beside it
    UNIT: str = ""  # of scores
    CURVES: Sequence[str] = ()  # the order in which curves are offered; others come after
    WARNINGS: Sequence[str] = ()  # names of early warnings

    def __init__(self, name: str) -> None:
        """Take the parts of module `name`; raise ValueError where it is no task."""
        module = task_module(name)
        self.name, self.Config, self.train = name, config_class(name), module.train
        for part, default in vars(Task).items():
            own = getattr(module, part, None)
            if not part.startswith("_") and own is not None and callable(own) == callable(default):
                setattr(self, part, own)

    def groups(self) -> Mapping[str, Mapping[str, Any]]:
        """Return presets by group and name, such as data=digits."""
        return {}

    def validate(self, config: Any, ranks: int = 1) -> None:
        """Raise ValueError, one line with key, rule and value, for a configuration that so many ranks cannot train."""

    def check(self, configs: Sequence[Any], ranks: int = 1) -> None:
        """Raise ValueError for what would stop a run of any of `configs` on this machine, such as missing data."""

    def check_data(self, config: Any) -> str:
        """Return in one line what the data of `config` is, "" for none; raise ValueError where it is not whole."""
        return ""

    def bytes_of_a_run(self, config: Any) -> int:
        """Return what a run holds on disk at most."""
        return 2**20

    def probed_at(self, config: Any, epochs: Sequence[int]) -> Any:
        """Return `config` with a probe after each of `epochs`; where it probes after every epoch anyhow, as it is."""
        return config

    def cost_shape(self, values: Mapping[str, Any]) -> object:
        """Return what an epoch's cost follows from, equal for runs that cost alike."""
        return None

    def published_cost(self, values: Mapping[str, Any]) -> tuple[float, str] | None:
        """Return GPU-hours of an epoch that others have published, and where they stand; None where nobody has."""
        return None

    def warnings(self, values: Mapping[str, Any], probes: Probes, losses: Callable[[float], LossCurve] | None) -> list[EarlyWarning]:
        """Return the early warnings of a run by its probes and the losses of a last share of it; None after its end."""
        return []

    def check_warning(self, name: str, values: Mapping[str, Any]) -> None:
        """Raise ValueError where a run of `values` could never be warned of `name` before its end."""

    def sampling_error(self, score: float, images: int) -> float | None:
        """Return the standard error that a score has by the choice of its images; None if unknown."""
        return None

    def title(self, name: str) -> str:
        """Return what people call a metric or a recorded number."""
        return name.replace("_", " ")

    def is_pictured(self, metric: str) -> bool:
        """Return whether a metric gets a figure of its own."""
        return True

    def word(self, key: str, value: str) -> str:
        """Return what people call the value of a key where it is a word."""
        return value

    def summary(self, values: Mapping[str, Any]) -> str:
        """Return in one line what was trained."""
        return ", ".join(f"{k} {v}" for k, v in values.items() if k != "seed" and not isinstance(v, (dict, list)))

    def export(self, config: Any, state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
        """Return the tensors worth keeping of a checkpoint's state, and what to note beside them."""
        raise ValueError(f"task must define export to have its weights exported; got {self.name}")

    def value(self, values: Mapping[str, Any], what: str, default: Any) -> Any:
        """Return what plain `values` hold under the key of `what`, `default` where KEYS has none."""
        return lookup(values, self.KEYS[what]) if what in self.KEYS else default

    def get(self, config: Any, what: str, default: Any) -> Any:
        """Return the same of a configuration."""
        return functools.reduce(getattr, self.KEYS[what].split("."), config) if what in self.KEYS else default

    def put(self, config: Any, what: str, value: Any) -> None:
        """Change it, where KEYS has `what`."""
        if what in self.KEYS:
            *path, last = self.KEYS[what].split(".")
            setattr(functools.reduce(getattr, path, config), last, value)


@functools.cache
def task_named(name: str) -> Task:
    """Return the task that a module is; raise ValueError where it is none."""
    return Task(name)


def task_of(config: Any) -> Task:
    """Return the task of a configuration, also as plain values."""
    return task_named(task_name(config))
