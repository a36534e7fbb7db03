"""Use sweeps from Python: plan, run, watch and open them, in a script or a notebook.

`from sweeps import Sweep, plan, run`; docs/reference/python-api.md has examples.
"""

import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from cnnjepa.run import checkpoint
from cnnjepa.run.folder import RunFolder
from cnnjepa.run.identity import leaves, task_module, task_name
from cnnjepa.run.ranks import Device
from jobs.cli import resolved
from jobs.plain import PlainTask
from jobs.task import task_of
from jobs.trials import find
from sweeps.cli import run as command
from sweeps.cli.plan import parse
from sweeps.cli.plan import plan as planned
from sweeps.cli.sweep_file import spec_of
from sweeps.report import aggregate
from sweeps.report.status import sweep_status
from sweeps.search.search import is_over
from sweeps.spec.hyperparameters import columns
from sweeps.spec.sweep import SweepSpec
from sweeps.spec.sweep import Trial as PlannedTrial
from sweeps.state import folder
from sweeps.state.view import View

if TYPE_CHECKING:
    import pandas as pd
    import torch

_POLL_SECONDS = 5.0


def plan(sweep: "SweepSpec | str | Path", *overrides: str, **options: Any) -> "Sweep":
    """Plan a sweep, and check it, without running it; arguments as for `run`. Write nothing."""
    spec = _spec(sweep)
    words = _words(overrides, {**options, "dry_run": True})
    return Sweep(planned(spec, parse(spec, words))[0])


def run(sweep: "SweepSpec | str | Path", *overrides: str, quiet: bool = False, **options: Any) -> "Sweep":
    """Run or resume a sweep, and return it; on Slurm submit what is missing and return at once.

    `sweep` is a SweepSpec, or the path of a file with one. `overrides` are words such as "epochs=5".
    `options` are those of the sweep's command, with _ for -: `cluster="local"`, `seeds=3`,
    `retry_failed=True`. With `quiet`, nothing is printed. Failed trials raise nothing: see `Sweep.status`.

    Raise ValueError, before anything starts, where the command line would end with status 2.
    KeyboardInterrupt lets running trials save first. No signal handler is installed, so any thread may call this.
    """
    spec, words = _spec(sweep), _words(overrides, options)
    made: list[folder.Sweep] = []
    shown = None
    if quiet:
        shown = Console(file=open(os.devnull, "w"), width=150)  # noqa: SIM115, closed below
    before = dict(os.environ)
    _require_no_ray()
    try:
        command.run(spec, words, command=f"run({spec.name})", console=shown, embedded=made.append)
    finally:
        if shown is not None:
            shown.file.close()
        for name in os.environ.keys() - before.keys():  # what Ray was given is not for the caller's own Ray
            del os.environ[name]
        os.environ.update(before)
    return Sweep.open(made[0].path) if (made[0].path / "sweep.json").exists() else Sweep(made[0])


def _spec(sweep: "SweepSpec | str | Path") -> SweepSpec:
    spec = sweep.resolved() if isinstance(sweep, SweepSpec) else spec_of(str(sweep))
    if not spec.name:
        raise ValueError("name must be given to a SweepSpec that no file holds, since it names a folder; got none")
    return spec


def _words(overrides: tuple[str, ...], options: Mapping[str, Any]) -> list[str]:
    """Return the words of a command line; a list is an option that is given several times."""
    words: list[str] = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif value is not False and value is not None:
            for one in value if isinstance(value, (list, tuple)) else [value]:
                words += [flag, str(one)]
    return [*words, *overrides]


def _require_no_ray() -> None:
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        raise ValueError("Ray must be free in this process, since a sweep starts its own; got one that runs: call ray.shutdown() first")


@dataclass(frozen=True)
class Trial:
    """One configuration with one seed, as it stands now."""

    run_id: str
    configuration: str
    seed: int
    state: str  # waiting, running, interrupted, completed, pruned, failed, cancelled or damaged
    cause: str  # of a failure, a pruning or a missing score
    hyperparameters: dict[str, Any]  # full key -> value
    metrics: dict[str, float]  # final scores, {} until it has ended
    costs: dict[str, float]
    overrides: list[str]  # key=value of all that makes it
    folder: Path
    number: int  # given once, when the trial entered the folder
    name: str  # such as 03-depth2-seed43
    _values: dict[str, Any] = field(repr=False, default_factory=dict)

    @property
    def config(self) -> Any:
        """Return the configuration object of its trainer."""
        return PlannedTrial(0, "", self.seed, self._values, self.run_id).config

    def checkpoint(self, device: str = "cpu") -> dict[str, Any]:
        """Return the state of the newest intact checkpoint, its tensors on `device`: of a PlainTask, what it saved.

        Raise ValueError if there is none.
        """
        import torch

        own = task_module(task_name(self._values))
        found = checkpoint.newest_good(self.folder / "checkpoints")
        if found is None:
            raise ValueError(f"a run folder must hold an intact checkpoint; got {self.folder}, whose trial is {self.state}")
        if not isinstance(own, PlainTask):
            return checkpoint.read(found, torch.device(device))
        saved: dict[str, Any] = checkpoint.read(found, torch.device(device), own.pickled)["state"]
        return saved

    def encoder(self, device: str = "cpu") -> "torch.nn.Module":
        """Return the network that is probed, with the weights of the newest intact checkpoint, in eval mode.

        Raise ValueError without a checkpoint, or if the task has no encoder.
        """
        network = task_of(self._values).encoder(self.config, self.checkpoint())
        return network.to(device).eval()  # type: ignore[no-any-return]

    def features(self, folder: "str | Path", device: str = "cpu") -> "pd.DataFrame":
        """Return the features that the probes see of each image below `folder`, a row per image; its index has their paths.

        Images are resized and normalised as in the run. Raise ValueError without a checkpoint or images.
        """
        import pandas as pd

        task, place = task_of(self._values), resolved(Path(folder), "folder")
        names, found = task.features(self.config, self.checkpoint(), place, Device[device])
        return pd.DataFrame(found.cpu().numpy(), index=names)

    def history(self) -> "pd.DataFrame":
        """Return what the run has recorded so far, a row per record: `kind`, `step`, and each number."""
        import pandas as pd

        return pd.DataFrame(RunFolder(self.folder).metrics())


@dataclass(frozen=True)
class Best:
    """The configuration with the best mean of the objective over its completed seeds."""

    configuration: str
    metric: str
    mean: float
    std: float | None  # None with one seed
    significant: bool  # by the declared test, against the next one
    hyperparameters: dict[str, Any]  # of all its seeds
    trials: list[Trial]  # the completed ones, best first

    @property
    def trial(self) -> Trial:
        """Return its best trial."""
        return self.trials[0]


class Sweep:
    """A sweep's folder. Each call reads it again, except for ended trials."""

    def __init__(self, sweep: folder.Sweep) -> None:
        """Take a sweep that was planned or loaded; see `Sweep.open`."""
        self._view = View.here(sweep)

    @staticmethod
    def open(path: "str | Path") -> "Sweep":
        """Open the folder of a sweep, also while it runs; raise ValueError if it holds none."""
        return Sweep(folder.Sweep.load(resolved(Path(path), "path")))

    def __repr__(self) -> str:
        """Return the call that opens it."""
        return f"Sweep.open({str(self.path)!r})"

    @property
    def path(self) -> Path:
        """Return its folder."""
        return self._view.sweep.path

    @property
    def objective(self) -> str:
        """Return the metric that ranks configurations."""
        return self._view.sweep.objective

    def _look(self) -> View:
        if (self.path / "sweep.json").exists() and not self._view.follow():
            self._view = View.here(folder.Sweep.load(self.path))
        self._view.look_again()
        self._view.states()
        return self._view

    def status(self) -> dict[str, Any]:
        """Return how far it is: `counts` by state, and `trials` in detail."""
        return sweep_status(self._look())

    @property
    def has_ended(self) -> bool:
        """Return whether every trial has ended and none is still to be chosen."""
        view = self._look()
        return is_over(view) and all(state.ended for state in view.states().values())

    def watch(self, every_seconds: float = _POLL_SECONDS) -> Iterator[dict[str, Any]]:
        """Yield `status()` now and then until the sweep has ended, and once more at its end.

        This only reads the folder: it goes on for as long as the sweep has trials left, also where
        no job or command runs them. `wait(timeout_seconds=...)` ends by itself.
        """
        while not self.has_ended:
            yield self.status()
            time.sleep(every_seconds)
        yield self.status()

    def wait(self, timeout_seconds: float | None = None, every_seconds: float = _POLL_SECONDS) -> "Sweep":
        """Return once the sweep has ended; raise TimeoutError after `timeout_seconds`."""
        end = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        while not self.has_ended:
            if end is not None and time.monotonic() >= end:
                raise TimeoutError(
                    f"{self.path} has not ended within {timeout_seconds:g} s: python -m sweeps status {shlex.quote(str(self.path))}"
                )
            time.sleep(every_seconds if end is None else max(min(every_seconds, end - time.monotonic()), 0.01))
        return self

    @property
    def trials(self) -> list[Trial]:
        """Return all trials, in the sweep's order."""
        view = self._look()
        return _trials(view, aggregate.rows(view))

    def trial(self, name: "str | int") -> Trial:
        """Return the trial of that number, name, run ID or CONFIGURATION/SEED; raise ValueError unless it is exactly one."""
        found = find(self._look().sweep.trials, str(name))
        return next(trial for trial in self.trials if trial.run_id == found.signature)

    def to_frame(self) -> "pd.DataFrame":
        """Return a row per trial: its run ID, configuration, seed, state and cause; a column per hyperparameter, metric and cost.

        A hyperparameter's column has its full key; those in which trials differ come first. A
        metric's or cost's has its name. Before a name that is taken stands `config.`, `metric.` or
        `cost.`. What a trial lacks is NaN. The last two columns are its number and its name.
        """
        import pandas as pd

        trials, first = self.trials, ["run_id", "configuration", "seed", "state", "cause"]
        sweep = self._view.sweep
        ordered = [*columns(sweep.trials, sweep.search), *(key for t in trials for key in t.hyperparameters)]
        keys = {key: f"config.{key}" if key in first else key for key in ordered if key != "seed"}
        taken = {*first, *keys.values()}
        table: dict[str, list[Any]] = {name: [getattr(t, name) for t in trials] for name in first}
        table |= {shown: [t.hyperparameters.get(key, float("nan")) for t in trials] for key, shown in keys.items()}
        names = dict.fromkeys([self.objective, *(name for t in trials for name in t.metrics)])
        table |= {f"metric.{n}" if n in taken else n: [t.metrics.get(n, float("nan")) for t in trials] for n in names}
        taken |= {*names}
        costs = dict.fromkeys(name for t in trials for name in t.costs)
        table |= {f"cost.{n}" if n in taken else n: [t.costs.get(n, float("nan")) for t in trials] for n in costs}
        taken |= {*costs}
        table |= {f"trial.{n}" if n in taken else n: [getattr(t, n) for t in trials] for n in ("number", "name")}
        return pd.DataFrame(table)

    def best(self) -> Best | None:
        """Return the best configuration, or None as long as no run of any has completed."""
        view = self._look()
        table, sign = aggregate.rows(view), view.sweep.sign
        lead = aggregate.leader_of(view, aggregate.summaries(view, table), self.objective)
        if lead is None:
            return None
        spread = lead.best.spreads[self.objective]
        assert spread.mean is not None
        own = {row.signature for row in table if row.configuration == lead.best.configuration}
        done = [t for t in _trials(view, table) if t.run_id in own and t.state == "completed" and self.objective in t.metrics]
        done.sort(key=lambda t: -sign * t.metrics[self.objective])
        shared = {k: v for k, v in done[0].hyperparameters.items() if k != "seed"}
        return Best(lead.best.label, self.objective, spread.mean, spread.std, bool(lead.significant), shared, done)


def _trials(view: View, table: Sequence[aggregate.Row]) -> list[Trial]:
    """Return the trials of a view, of which `table` has the rows."""
    return [
        Trial(
            row.signature,
            row.label,
            row.seed,
            row.state.name,
            row.cause,
            dict(leaves(trial.values)),
            dict(row.metrics),
            dict(row.costs),
            list(trial.overrides),
            view.sweep.trial_dir(trial),
            trial.number,
            trial.name,
            trial.values,
        )
        for row, trial in zip(table, view.sweep.trials, strict=True)
    ]
