"""The sweep folder: sweep.json (the trials and how they are ranked) and trials/<signature>/, which are the truth about them.

The trials of a search are not all known beforehand: points/<number>.json is written, by whoever chooses it, for each but the first.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path

from cnnjepa.run import checkpoint
from cnnjepa.run.files import create_exclusive, read_json, reading, to_json, write_atomic
from cnnjepa.run.folder import RunFolder, RunResult, RunStatus, read_probes
from cnnjepa.run.losses import LossCurve
from jobs.slurm.queue import Queue, has_slurm
from jobs.slurm.sacct import JobUse
from sweeps.spec.space import applied
from sweeps.spec.sweep import ScaleName, Search, SweepSpec, Trial
from sweeps.state import claims


class TrialState(Enum):
    """Where a trial stands.

    `interrupted` was begun and waits for any slot to resume it, `requeued` for its own Slurm job to start again; `cancelled` waits for a
    person to run the sweep again.
    """

    waiting = "waiting"
    running = "running"
    requeued = "requeued"
    interrupted = "interrupted"
    cancelled = "cancelled"
    completed = "completed"
    pruned = "pruned"
    failed = "failed"

    @property
    def ended(self) -> bool:
        """Whether nothing is left to run."""
        return self in (TrialState.completed, TrialState.pruned, TrialState.failed)

    @property
    def settled(self) -> bool:
        """Whether nothing happens by itself any more."""
        return self.ended or self is TrialState.cancelled


_STATES = {
    claims.Standing.alive: TrialState.running,
    claims.Standing.requeued: TrialState.requeued,
    claims.Standing.cancelled: TrialState.cancelled,
    claims.Standing.dead: TrialState.interrupted,
}


@dataclass(frozen=True)
class Sweep:
    """What sweep.json holds: enough to run slots and to write results without the sweep's own file."""

    path: Path
    name: str
    question: str
    scale: ScaleName
    objective: str
    headline: list[str]
    paper: dict[str, dict[str, float]]  # setting -> metric -> the paper's value; only what the scale may be held against
    trials: list[Trial]
    search: Search | None = None
    rungs: list[int] = field(default_factory=list)  # epochs at which a run is held against the others; none: every run goes to its end
    eta: int = 0  # of those that reached a rung one in so many goes on
    costs: list[str] = field(default_factory=list)  # that belong to the answer
    best_of_many: list[str] = field(default_factory=list)  # settings whose scores in the paper are each the best of several runs
    prune_on: list[str] = field(default_factory=list)  # early warnings that end a run: sweeps/search/warnings.py
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
        """The sweep of `spec`; the paper's values, and the metrics that they are values of, are kept at paper scale alone."""
        published = [s for s in spec.settings_at(spec.scale(scale)) if s.paper and scale is ScaleName.paper]
        paper = {spec.label(s): dict(s.paper) for s in published}
        metrics = [metric for values in paper.values() for metric in values if metric not in spec.costs]
        headline = list(dict.fromkeys([*spec.headline, *metrics]))
        sweep = Sweep(path, spec.name, spec.question, scale, spec.objective, headline, paper, trials, search, list(rungs), eta)
        sweep.costs.extend(spec.costs)
        sweep.prune_on.extend(spec.prune_on)
        sweep.best_of_many.extend(spec.label(s) for s in published if s.best_of_many)
        sweep.grow()
        return sweep

    @staticmethod
    def load(path: Path) -> "Sweep":
        """The sweep that `write` left; raises ValueError where there is none."""
        file = path / "sweep.json"
        if not os.path.exists(file):
            raise ValueError(f"a sweep folder must hold sweep.json; got {path}")
        try:
            values = read_json(file)
            trials = [Trial.from_dict(t) for t in values.pop("trials")]
            search = values.pop("search")
            known = {**values, "scale": ScaleName[values["scale"]], "search": Search.from_dict(search) if search else None}
            sweep = Sweep(path=path, trials=trials, **known)
            sweep.grow()
            return sweep
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            said = f"{type(error).__name__} {' '.join(str(error).split())}"
            raise ValueError(f"sweep.json must be one that a sweep wrote; got {file}: {said}") from error

    def write(self) -> None:
        """Publish sweep.json; the same sweep writes the same bytes."""
        self.path.mkdir(parents=True, exist_ok=True)
        values = {k: v for k, v in vars(self).items() if k not in ("path", "_next")}
        given = [t.to_dict() for t in self.trials[: 1 if self.search else None]]
        search = self.search.to_dict() if self.search else None
        text = to_json({**values, "scale": self.scale.name, "trials": given, "search": search})
        write_atomic(self.path / "sweep.json", text)

    def grow(self) -> None:
        """Take in the trials that have been chosen since; those of another space or base are no trials of this search."""
        if self.search is None:
            return
        points = self.path / "points"
        if points.exists() and not points.is_dir():
            raise ValueError(f"points must be a folder; got {points}, which is none")
        while (file := self.point_file(self.next_number)).exists():
            with reading(file):
                values = read_json(file)
                if not isinstance(values["search"], str):
                    raise TypeError("search is no digest")
                if values.pop("search") == self.search.digest:
                    self.trials.append(Trial(values=applied(self.search.base, values["params"], values["seed"]), **values))
            self._next[0] += 1

    @property
    def next_number(self) -> int:
        """Of the trial that is chosen next."""
        return self._next[0]

    @property
    def cancelled(self) -> bool:
        """Whether a person has stopped the search: it chooses nothing until its command is run again."""
        return self.search is not None and self._cancelled.exists()

    @property
    def _cancelled(self) -> Path:
        return self.path / "cancelled"

    def cancel(self) -> None:
        """Choose no further trial until `uncancel`."""
        if self.search is not None:
            self._cancelled.touch()

    def uncancel(self) -> None:
        """Choose trials again."""
        self._cancelled.unlink(missing_ok=True)

    def expecting(self, hours_per_epoch: float | None) -> "Sweep":
        """The same, told what an epoch is expected to cost."""
        if self.search is None or hours_per_epoch is None:
            return self
        return replace(self, search=replace(self.search, hours_per_epoch=hours_per_epoch))

    def point_file(self, number: int) -> Path:
        """Where the choice of trial `number` of a search is kept."""
        return self.path / "points" / f"{number:06d}.json"

    def register(self, trial: Trial) -> bool:
        """Write down that `trial` is the next one; False where another slot has taken its number."""
        assert self.search is not None
        file = self.point_file(trial.number)
        file.parent.mkdir(parents=True, exist_ok=True)
        values = {k: v for k, v in trial.to_dict().items() if k != "values"}
        return create_exclusive(file, to_json({**values, "search": self.search.digest}))

    def trial_dir(self, trial: Trial) -> Path:
        """The run folder of `trial`."""
        return self.path / "trials" / trial.signature

    def run(self, trial: Trial) -> RunFolder:
        """The run of `trial`."""
        return RunFolder(self.trial_dir(trial))


def slurm_queue(sweep: Sweep, refresh_seconds: float = 5.0) -> Queue | None:
    """What Slurm says of the sweep's jobs; None where it has none, or Slurm is not installed here."""
    return Queue(refresh_seconds) if has_slurm() and (sweep.path / "submissions").is_dir() else None


class View:
    """What the run folders say, read again only where it can have changed: an ended trial is read once."""

    @staticmethod
    def here(sweep: Sweep) -> "View":
        """A view that asks Slurm about the sweep's jobs, where it has any and Slurm is installed."""
        return View(sweep, queue=slurm_queue(sweep))

    def __init__(
        self, sweep: Sweep, silent: frozenset[Path] = frozenset(), queue: Queue | None = None, remember_seconds: float = 0.0
    ) -> None:
        """`silent` are claims of other hosts that a `claims.Watch` has found dead; `queue` knows of owners in Slurm jobs.

        A state is looked at anew after `remember_seconds`, or after `look_again`: many ask for it in one look.
        """
        self._remember = remember_seconds
        self._states: dict[str, tuple[float, TrialState]] = {}
        self.sweep = sweep
        self.watch = claims.Watch(silent, queue=queue)
        self._runs: dict[str, RunFolder] = {}
        self._hours: dict[str, float] = {}
        self._followed = 0  # when the sweep.json that was taken up last had been written
        self._results: dict[str, RunResult] = {}
        self._claims: dict[str, list[claims.Claim]] = {}
        self._settled: set[str] = set()  # trials whose claims were read after their results
        self._losses: dict[str, LossCurve] = {}
        self.accounted: dict[str, JobUse | None] = {}  # what sacct has said of jobs; None where it had nothing to say
        self.accounting = ""  # whether it "answers", is "silent", or there is "none"; "" until it is asked
        self._probes: dict[str, tuple[dict[str, dict[str, float]], int]] = {}  # of runs that have not ended, and how far they were read

    def follow(self) -> bool:
        """Take up what a command has made of a search since the last call; False where it is another search now."""
        if self.sweep.search is None:
            return True
        written = (self.sweep.path / "sweep.json").stat().st_mtime_ns
        if written == self._followed:
            return True
        now = Sweep.load(self.sweep.path)
        if now.search is None or now.search.digest != self.sweep.search.digest:
            return False
        self.sweep, self._followed = now, written
        # A failed or pruned trial may have been set aside, to be run again.
        self._results = {s: r for s, r in self._results.items() if r.status is RunStatus.completed}
        self._states.clear()
        self._hours.clear()
        return True

    def look_again(self) -> None:
        """Remember no state of a trial that has not ended: what happens next goes by how things stand now."""
        self._states = {s: known for s, known in self._states.items() if known[1].ended}

    def _run(self, trial: Trial) -> RunFolder:
        """The run of the trial; its paths are made once, since thousands are looked at for one choice."""
        known = self._runs.get(trial.signature)
        if known is None:
            known = self._runs[trial.signature] = self.sweep.run(trial)
        return known

    def result(self, trial: Trial) -> RunResult | None:
        """The trial's result, once it has one."""
        if trial.signature not in self._results:
            found = self._run(trial).result()
            if found is None:
                return None
            self._results[trial.signature] = found
        return self._results[trial.signature]

    def state(self, trial: Trial) -> TrialState:
        """Where the trial stands now."""
        known = self._states.get(trial.signature)
        if known is None or (not known[1].ended and time.monotonic() - known[0] >= self._remember):
            known = time.monotonic(), self._look(trial)
            self._states[trial.signature] = known
        return known[1]

    def _look(self, trial: Trial) -> TrialState:
        result = self.result(trial)
        if result is not None:
            return TrialState[result.status.name]
        folder = self._run(trial).path
        names = claims.listing(folder)
        past = self._claims_among(trial, names)
        if not past:
            return TrialState.cancelled if claims.is_cancelled(folder, names) else TrialState.waiting
        return _STATES[self.watch.standing(folder, past[-1], names)]

    def _claims_among(self, trial: Trial, names: frozenset[str]) -> list[claims.Claim]:
        """The claims among the names of a listing; a claim that was read is not read again."""
        past = claims.history(self._run(trial).path, names, self._claims.get(trial.signature, ()))
        self._claims[trial.signature] = past
        return past

    def judged_claims(self, trial: Trial) -> list[claims.Claim]:
        """The claims that the last look at the trial's state went by; nothing is asked anew."""
        return self._claims.get(trial.signature, [])

    def claims(self, trial: Trial) -> list[claims.Claim]:
        """All claims of the trial, oldest first; of one that has ended nothing is looked for again."""
        # One that was begun and ended between two looks has a result, and the claims of the look before: none.
        if trial.signature not in self._settled:
            ended = trial.signature in self._results
            self._claims_among(trial, claims.listing(self._run(trial).path))
            if ended:
                self._settled.add(trial.signature)
        return self._claims[trial.signature]

    def states(self) -> dict[str, TrialState]:
        """The state of each trial by signature, those chosen meanwhile among them."""
        self.sweep.grow()
        return {t.signature: self.state(t) for t in self.sweep.trials}

    def hosts_elsewhere(self) -> list[str]:
        """The other hosts (or containers) whose processes own trials that have not ended."""
        unfinished = [t for t in self.sweep.trials if self.state(t) is TrialState.running]
        owners = [self.claims(t)[-1].owner for t in unfinished]
        return sorted({o.host for o in owners if not o.is_local})

    def device_hours(self, trial: Trial) -> float:
        """What an ended trial has cost: the time that its jobs held GPUs in Slurm, lost steps among it; elsewhere what training took."""
        if trial.signature not in self._hours:
            folder, past = self._run(trial).path, self.claims(trial)
            held = sum(claims.held_seconds(folder, c) * c.slurm.gpus / 3600 for c in past if c.slurm)
            result = self.result(trial)
            self._hours[trial.signature] = held or (result.device_hours if result is not None else 0.0)
        return self._hours[trial.signature]

    def probes(self, trial: Trial) -> dict[str, dict[str, float]]:
        """Epoch -> metrics of the probes on the way, so far; what was read is not read again."""
        result = self.result(trial)
        if result is not None:
            return result.probes
        # A resumed run writes again what came after its checkpoint, and the same: what is known of that stays true.
        known, start = self._probes.get(trial.signature, ({}, 0))
        path = self._run(trial).path / "metrics.jsonl"
        if path.exists() and path.stat().st_size < start:
            start = 0
        more, end = read_probes(path, start)
        self._probes[trial.signature] = {**known, **more}, end
        return self._probes[trial.signature][0]

    def losses(self, trial: Trial) -> LossCurve:
        """The losses that a trial which has not ended has recorded, of its last part at least; what was read is not read again."""
        curve = self._losses.setdefault(trial.signature, LossCurve(trial.epochs))
        share = trial.values["warnings"]["plateau_share"]
        curve.read(self._run(trial).path / "metrics.jsonl", share)
        return curve

    def rung_values(self, epoch: int, seed: int) -> dict[str, float]:
        """The objective at a rung, by signature, of the trials of that seed that have reached it with a value."""
        found = {}
        for trial in self.sweep.trials:
            value = self.probes(trial).get(str(epoch), {}).get(self.sweep.objective) if trial.seed == seed else None
            if value is not None:
                found[trial.signature] = value
        return found

    def objective(self, trial: Trial) -> float | None:
        """The number by which the trial is ranked; None where it has none."""
        result = self.result(trial)
        return None if result is None else result.metrics.get(self.sweep.objective)

    def reached_step(self, trial: Trial) -> int:
        """The optimiser step to which the trial could be resumed now."""
        found = checkpoint.find(self.sweep.run(trial).checkpoints)
        return found[0].step if found else 0
