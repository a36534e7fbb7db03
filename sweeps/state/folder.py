"""Read and write the sweep folder: sweep.json and the run folders trials/<run ID>/.

sweep.json lists the trials and how they are ranked; the run folders are the truth about them. In a
search, the process that chooses a trial writes points/<number>.json, except for the first trial.
Without a search, numbers/ says which number a trial got when it entered the folder.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cnnjepa.run.files import DamagedError, create_exclusive, read_json, reading, sealed_json, write_atomic
from cnnjepa.run.folder import RunFolder
from cnnjepa.run.identity import fidelity
from cnnjepa.run.typed import build, checked
from jobs import program
from jobs.slurm.nodes import Nodes
from jobs.task import Task, task_named, task_of
from sweeps.spec.rungs import rung_epochs
from sweeps.spec.sweep import ScaleName, Search, SweepSpec, Trial
from sweeps.state import choices, numbers
from sweeps.state.damage import cause_of
from sweeps.state.place import record_place


@dataclass(frozen=True)
class Sweep:
    """Content of sweep.json: enough to run workers and write results without the sweep's file."""

    path: Path
    name: str
    question: str
    scale: ScaleName
    objective: str
    headline: list[str]
    # configuration -> metric -> the paper's value; only those comparable at this scale
    paper: dict[str, dict[str, float]]
    trials: list[Trial]
    search: Search | None = None
    # Epochs at which a run is compared with the others. If empty, every run goes to its end.
    rungs: list[int] = field(default_factory=list)
    eta: int = 0  # one in `eta` of the runs that reach a rung goes on
    costs: list[str] = field(default_factory=list)  # metrics of cost that are part of the answer
    # Configurations whose scores in the paper are each the best of several runs.
    best_of_many: list[str] = field(default_factory=list)
    # Early warnings that end a run: sweeps/search/warnings.py.
    prune_on: list[str] = field(default_factory=list)
    # [first, most] seeds, if further ones are added until the best is decided; else [].
    until: list[int] = field(default_factory=list)
    # Choices of a search that cannot be read: number -> cause.
    damaged: dict[int, str] = field(default_factory=dict, init=False, compare=False)
    _next: list[int] = field(default_factory=lambda: [1])

    @staticmethod
    def of(
        spec: SweepSpec,
        scale: ScaleName,
        trials: list[Trial],
        path: Path,
        search: Search | None = None,
        rungs: Sequence[int] = (),
        eta: int = 0,
    ) -> "Sweep":
        """Return the sweep of `spec`. Only paper scale has the paper's values and their metrics."""
        named = zip(spec.labels(spec.scale(scale)), spec.configurations_at(spec.scale(scale)), strict=True)
        published = {label: s for label, s in named if s.paper and scale is ScaleName.paper}
        paper = {label: dict(s.paper) for label, s in published.items()}
        metrics = [metric for values in paper.values() for metric in values if metric not in spec.costs]
        task = task_named(spec.task_name)
        objective, shown = spec.objective or task.OBJECTIVE, spec.headline
        if shown is None:  # of the task's, those that some run can have
            known = [task.metrics(t.values) for t in trials]
            shown = [m for m in task.HEADLINE if any(given is None or m in given for given in known)]
        if not objective:
            rule = "be given by the sweep, or by its task as OBJECTIVE"
            raise ValueError(f"objective must {rule}; got none in {spec.name} and {spec.task_name}")
        headline = list(dict.fromkeys([*shown, *metrics]))
        sweep = Sweep(path, spec.name, spec.question, scale, objective, headline, paper, trials, search, list(rungs), eta)
        sweep.costs.extend(spec.costs)
        sweep.prune_on.extend(spec.prune_on)
        sweep.best_of_many.extend(label for label, s in published.items() if s.best_of_many)
        if search is None:
            numbers.renumber(path, sweep.trials)
        sweep.grow()
        return sweep

    @property
    def task(self) -> Task:
        """Return the task that trains the runs."""
        return task_of(self.trials[0].values if self.trials else {})

    @property
    def sign(self) -> float:
        """Return -1 if a lower objective is better, else 1."""
        return self.task.sign(self.objective)

    @property
    def counted(self) -> str:
        """Return what the lengths of its runs count: epochs or steps."""
        return fidelity(self.trials[0].values if self.trials else {})

    @property
    def varies_epochs(self) -> bool:
        """Return whether runs train for different numbers of epochs."""
        if self.search is not None:
            return any(d.key == fidelity(self.search.base) for d in self.search.space)
        return len({t.epochs for t in self.trials}) > 1

    def rungs_of(self, trial: Trial) -> list[int]:
        """Return the epochs at which the trial is compared, earliest first; they end as `rungs` do.

        Where epochs differ, each run has its rungs at the same shares of its own epochs, after its own
        warm-up and the first eighth: a short run may have fewer.
        """
        if not self.rungs or not self.varies_epochs:
            return self.rungs
        warmup = float(self.task.value(trial.values, "warmup_epochs", 0.0))
        return rung_epochs(trial.epochs, warmup, self.eta)[-len(self.rungs) :]

    @staticmethod
    def load(path: Path) -> "Sweep":
        """Load what `write` wrote; raise ValueError if there is no valid sweep.json."""
        program.use(path)
        file = path / "sweep.json"
        if not os.path.exists(file):
            raise ValueError(f"a sweep folder must hold sweep.json; got {path}")
        with reading(file):
            values = read_json(file)
            trials = [Trial.from_dict(t) for t in checked(list[dict[str, Any]], values.pop("trials"), "trials")]
            search = checked(dict[str, Any] | None, values.pop("search"), "search")
            sweep = build(Sweep, values, path=path, trials=trials, search=Search.from_dict(search) if search else None)
            if len({t.signature for t in trials}) < len(trials) or not trials:
                raise TypeError("trials must be different ones, at least one; got others")
        if search is None:
            numbers.renumber(path, sweep.trials, trials)
        sweep.grow()
        if sweep.search is not None:
            choices.require_no_gap(path, sweep.next_number)
        return sweep

    def write(self) -> None:
        """Write sweep.json atomically. The same sweep writes the same bytes."""
        self.path.mkdir(parents=True, exist_ok=True)
        record_place(self.path)
        if (files := program.find(self.task.name)) is not None:
            known = program.read(self.path)
            program.keep(self.path, replace(files, kept=known.kept if known else []))
        values = {k: v for k, v in vars(self).items() if k not in ("path", "damaged", "_next")}
        if self.search is None:
            numbers.give(self.path, self.trials)
        given = [t.to_dict() for t in self.trials[: 1 if self.search else None]]
        search = self.search.to_dict() if self.search else None
        text = sealed_json({**values, "scale": self.scale.name, "trials": given, "search": search})
        write_atomic(self.path / "sweep.json", text)

    def grow(self) -> None:
        """Add the trials chosen since the last call, except those of another space or base.

        A choice that cannot be read costs its own trial, and is noted in `damaged`.
        """
        if self.search is None:
            return
        choices.folder_of(self.path)
        while (file := self.choice_file(self.next_number)).exists():
            try:
                if (trial := choices.read(file, self.search)) is not None:
                    self.trials.append(trial)
            except DamagedError as error:
                self.damaged[self.next_number] = cause_of(error, self.path)
            self._next[0] += 1

    @property
    def next_number(self) -> int:
        """Return the number of the next trial to choose."""
        return self._next[0]

    @property
    def cancelled(self) -> bool:
        """Return whether a person stopped the search. It goes on when the sweep is run again."""
        return self.search is not None and (self.path / "cancelled").exists()

    def cancel(self) -> None:
        """Choose no further trial until `uncancel`."""
        if self.search is not None:
            (self.path / "cancelled").touch()

    def uncancel(self) -> None:
        """Choose trials again."""
        (self.path / "cancelled").unlink(missing_ok=True)

    def note_exhausted(self, situation: str) -> None:
        """Record that a search found no further configuration in this situation, a text."""
        write_atomic(self.path / "exhausted", situation.encode())

    def is_exhausted(self, situation: str) -> bool:
        """Return whether a search found no further configuration in this situation. A file that cannot be read says no."""
        try:
            return (self.path / "exhausted").read_bytes() == situation.encode()
        except OSError:
            return False

    def expecting(self, hours_per_epoch: float | None) -> "Sweep":
        """Return this sweep with `hours_per_epoch` as the expected cost of an epoch."""
        if self.search is None or hours_per_epoch is None:
            return self
        return self._searching(replace(self.search, hours_per_epoch=hours_per_epoch))

    def _searching(self, search: Search) -> "Sweep":
        made = replace(self, search=search)
        made.damaged.update(self.damaged)
        return made

    def with_seeds(self, seeds: int) -> "Sweep":
        """Return this search with so many seeds for its finalists."""
        assert self.search is not None
        return self._searching(replace(self.search, seeds=seeds))

    def with_trials(self, trials: list[Trial]) -> "Sweep":
        """Return this sweep, which is no search, with other trials; they get their numbers."""
        made = replace(self, trials=trials)
        numbers.renumber(made.path, made.trials)
        return made

    def choice_file(self, number: int) -> Path:
        """Return the file that records the choice of trial `number` of a search."""
        return choices.file_of(self.path, number)

    def register(self, trial: Trial) -> bool:
        """Record `trial` as the next one; return False if another worker took its number."""
        assert self.search is not None
        file = self.choice_file(trial.number)
        file.parent.mkdir(parents=True, exist_ok=True)
        values = {k: v for k, v in trial.to_dict().items() if k != "values"}
        return create_exclusive(file, sealed_json({**values, "search": self.search.digest}))

    def trial_dir(self, trial: Trial) -> Path:
        """Return the path of the run folder of `trial`."""
        return self.path / "trials" / trial.signature

    @property
    def nodes(self) -> Nodes:
        """Return what is known of the nodes on which the sweep's jobs ran."""
        return Nodes(self.path / "nodes")

    def run(self, trial: Trial) -> RunFolder:
        """Return the run folder of `trial`."""
        return RunFolder(self.trial_dir(trial))
