"""What the launcher needs of a trainer. The default task is cnnjepa/task.py.

A task is a module with a dataclass `Config` and a function `train`, which keeps a run folder with
cnnjepa/run/. Anything else in `Task` is a default that the module may replace by the same name.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cnnjepa.run.folder import EarlyWarning, RunFolder, RunResult
from cnnjepa.run.identity import FIDELITY, config_class, fidelity, lookup, task_module, task_name
from cnnjepa.run.losses import LossCurve
from cnnjepa.run.scores import Probed, Scores

Judge = Callable[[int, dict[str, float]], str]
Probes = Mapping[str, Mapping[str, float]]


def score_format(unit: str, places: int = 2) -> str:
    """Return the format of one score, for Python and Plotly: `places` decimals for a percentage, else four digits."""
    return f".{places}f" if unit == "%" else ".4g"


class Task:
    """A trainer as the launcher sees it."""

    Config: type  # dataclass with `seed` and `epochs`; a field with `neutral` in its metadata cannot change a result
    # Trains to the end and returns the result, or None after a stop and a save: cnnjepa/train.py.
    train: Callable[[Any, RunFolder, Callable[[], bool], int, Judge], RunResult | None]
    # Optional dotted keys of what the launcher sets or reads: threads, device (a Device), data,
    # data_root (a folder), fingerprint (see `identified`), workers (loader processes), batch (images per step), warmup_epochs,
    # probes (how a run is scored), tensorboard (whether it writes curves into tensorboard/).
    KEYS: Mapping[str, str] = {}
    DEFAULTS: Sequence[Any] = ("_self_",)  # Hydra's defaults list; the cluster is appended
    RENAMED: Mapping[str, str] = {}  # old key: new key; files with the old one still open
    OBJECTIVE: str = ""  # metric that ranks configurations, unless a sweep names one
    METRICS: Sequence[str] = ()  # metrics that a run has at its end, if they are known: see `metrics`
    HEADLINE: Sequence[str] = ()  # metrics of the results table, unless a sweep names them
    MINIMIZED: Sequence[str] = ()  # metrics of which lower is better; of all others, higher is
    UNIT: str = ""  # of the scores, such as %
    RANKED: str = ""  # a sentence beside the answer of a report: which data rank configurations
    CURVES: Sequence[str] = ()  # metrics whose curves are offered first, in this order
    WARNINGS: Sequence[str] = ()  # names of early warnings

    def __init__(self, name: str) -> None:
        """Take what module `name` defines; raise ValueError if it is no task."""
        module = task_module(name)
        self.name, self.Config, self.train = name, config_class(name), module.train
        for part, default in vars(Task).items():
            own = getattr(module, part, None)
            if not part.startswith("_") and own is not None and callable(own) == callable(default):
                setattr(self, part, own)

    @property
    def declares_metrics(self) -> bool:
        """Return whether the task says which metrics its runs have."""
        return bool(self.METRICS) or "metrics" in vars(self)

    def groups(self) -> Mapping[str, Mapping[str, Any]]:
        """Return presets by group and name, such as data=digits."""
        return {}

    def validate(self, config: Any, ranks: int = 1) -> None:
        """Raise ValueError with key, rule and value if `ranks` ranks cannot train `config`."""

    def check(self, configs: Sequence[Any], ranks: int = 1) -> None:
        """Raise ValueError if a run of any of `configs` could not start on this machine."""

    def check_data(self, config: Any) -> str:
        """Describe the data of `config` in one line, or ""; raise ValueError if incomplete."""
        return ""

    def check_gpu(self, config: Any, seconds: float) -> list[tuple[str, str, str]]:
        """Check this machine's GPU with steps of `config` in about `seconds`; return findings: level, what, and what was seen.

        Levels are ok, warning, problem, and "not run" without a GPU.
        """
        return [("not run", "gpu", "the task has no check of a GPU")]

    def identified(self, configs: Sequence[Any]) -> tuple[Sequence[Any], list[str]]:
        """Return `configs` with what identifies the user's own data, and lines to show about these.

        Such data have the key `fingerprint`, a text that says how many images there are. Raise
        ValueError if they cannot be read.
        """
        return configs, []

    def length(self, config: Any) -> float:
        """Return how many epochs or steps a run trains; infinity if its configuration does not say."""
        return float(next(getattr(config, key) for key in FIDELITY if hasattr(config, key)))

    def counted(self, values: Mapping[str, Any]) -> str:
        """Return what the length of a run of plain `values` counts, epochs or steps; "" if its length is unknown."""
        return "" if math.isinf(self.length(SimpleNamespace(**values))) else fidelity(values)

    def bytes_of_a_run(self, config: Any) -> int:
        """Return the most bytes that a run keeps on disk."""
        return 2**20

    def continues(self, config: Any, shorter: Any) -> bool:
        """Return whether a run of `config` may begin with the checkpoint that one of `shorter` kept (cnnjepa/run/stable.py)."""
        return False

    def probed_at(self, config: Any, epochs: Sequence[int]) -> Any:
        """Return `config` with a probe after each of `epochs`, if it does not probe there yet."""
        return config

    def cost_shape(self, values: Mapping[str, Any]) -> object:
        """Return a value that is equal for runs whose epochs cost the same."""
        return None

    def published_cost(self, values: Mapping[str, Any]) -> tuple[float, str] | None:
        """Return published GPU-hours per epoch and their source, or None."""
        return None

    def warnings(self, values: Mapping[str, Any], probes: Probes, losses: Callable[[float], LossCurve] | None) -> list[EarlyWarning]:
        """Return early warnings; `losses(share)` gives the last losses, None for an ended run."""
        return []

    def check_warning(self, name: str, values: Mapping[str, Any]) -> None:
        """Raise ValueError if a run of `values` could not get warning `name` before its end."""

    def check_seeds(self, seeds: int) -> None:
        """Raise ValueError if runs of `seeds` seeds would be equal."""

    def metrics(self, values: Mapping[str, Any], final: bool = True) -> Sequence[str] | None:
        """Return the metrics of runs of `values`, or, unless `final`, those of their probes during training.

        One that ends in * stands for all that begin so. None if they are unknown.
        """
        return self.METRICS or None

    def check_objective(self, metric: str, values: Mapping[str, Any]) -> None:
        """Raise ValueError if runs of `values` cannot be ranked by `metric`."""

    def sampling_error(self, score: float, images: int) -> float | None:
        """Return the standard error that a score has by the choice of its images; None if unknown."""
        return None

    def sign(self, metric: str) -> float:
        """Return -1 for a metric of which lower is better, else 1."""
        return -1.0 if metric in self.MINIMIZED else 1.0

    def title(self, name: str) -> str:
        """Return the display name of a metric or a recorded number."""
        return name.replace("_", " ")

    def is_pictured(self, metric: str) -> bool:
        """Return whether `metric` gets a figure of its own."""
        return True

    def word(self, key: str, value: str) -> str:
        """Return the display name of a text value of `key`."""
        return value

    def summary(self, values: Mapping[str, Any]) -> str:
        """Return one line that says what was trained."""
        return ", ".join(f"{k} {v}" for k, v in values.items() if k != "seed" and not isinstance(v, (dict, list)))

    def export(self, config: Any, state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
        """Return the tensors to export from a checkpoint's state, and metadata for the file."""
        raise ValueError(f"task must define export for weights to be exported; got {self.name}")

    def encoder(self, config: Any, state: Mapping[str, Any]) -> Any:
        """Return the network of a checkpoint's state, a torch.nn.Module: what `Trial.encoder` of the Python API gives."""
        raise ValueError(f"task must define encoder for a run's network to be loaded; got {self.name}")

    def features(self, config: Any, state: Mapping[str, Any], folder: Path, device: Any) -> tuple[list[str], Any]:
        """Return names of what is in `folder` and a feature vector of each, a tensor [N, D]: `Trial.features` of the Python API."""
        raise ValueError(f"task must define features for those of a folder to be computed; got {self.name}")

    def probed(self, config: Any, own: Any) -> Sequence[Probed]:
        """Return each probe that `config` asks for, of a run whose configuration is `own`."""
        raise ValueError(f"task must define probed and probe to have its runs scored later; got {self.name}")

    def probe(self, config: Any, folder: RunFolder, wanted: Mapping[str, Sequence[str]]) -> Scores:
        """Run the probes of `wanted`, by data set, on the final checkpoint of a run. The call is collective over ranks.

        Raises ValueError where there is no such checkpoint.
        """
        raise ValueError(f"task must define probed and probe to have its runs scored later; got {self.name}")

    def value(self, values: Mapping[str, Any], what: str, default: Any) -> Any:
        """Return what plain `values` hold for the key of `what`; `default` if KEYS lacks it."""
        return lookup(values, self.KEYS[what]) if what in self.KEYS else default

    def get(self, config: Any, what: str, default: Any) -> Any:
        """Return what `config` holds for the key of `what`; `default` if KEYS lacks it."""
        return functools.reduce(getattr, self.KEYS[what].split("."), config) if what in self.KEYS else default

    def put(self, config: Any, what: str, value: Any) -> None:
        """Set the key of `what` in `config`, if KEYS has it."""
        if what in self.KEYS:
            *path, last = self.KEYS[what].split(".")
            setattr(functools.reduce(getattr, path, config), last, value)


@functools.cache
def task_named(name: str) -> Task:
    """Return the task in module `name`; raise ValueError if it is none."""
    return Task(name)


def task_of(config: Any) -> Task:
    """Return the task of a configuration, an object or plain values."""
    return task_named(task_name(config))
