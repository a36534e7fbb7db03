"""Read the run folders of a sweep, each ended trial once: results, states, claims and records."""

import contextlib
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from cnnjepa.run import checkpoint, progress
from cnnjepa.run.command_line import did_you_mean
from cnnjepa.run.folder import RunFolder, RunResult, RunStatus
from cnnjepa.run.losses import LossCurve
from cnnjepa.run.records import read_metrics, read_probes
from jobs.slurm.queue import Queue, has_slurm
from jobs.slurm.sacct import JobUse
from sweeps.spec.sweep import Trial
from sweeps.state import claims
from sweeps.state.damage import Damage
from sweeps.state.folder import Sweep
from sweeps.state.trial_state import OF_STANDING, TrialState

_NAMED = 6  # metrics in a cause


def slurm_queue(sweep: Sweep, refresh_seconds: float = 5.0) -> Queue | None:
    """Return the Slurm queue of the sweep's jobs, or None without jobs or without Slurm here."""
    return Queue(refresh_seconds) if has_slurm() and (sweep.path / "submissions").is_dir() else None


def with_objective(result: RunResult, objective: str) -> RunResult:
    """Return a result that says under `missing` that a completed run has no value of the objective."""
    if result.status is not RunStatus.completed or objective in result.metrics:
        return result
    if any(objective == probe or objective.startswith(f"{probe}.") for probe in result.missing):
        return result
    has = sorted(result.metrics)
    more = " ..." * (len(has) > _NAMED)
    said = f"the run has no value of it, but {', '.join(has[:_NAMED])}{more}" if has else "the run has no metrics"
    return replace(result, missing={**result.missing, objective: said + did_you_mean(objective, has)})


class View:
    """Cached reading of the run folders. An ended trial is read once.

    A trial whose folder cannot be read is damaged. It has no result, claims or probes, and the rest
    of the sweep goes on.
    """

    @staticmethod
    def here(sweep: Sweep) -> "View":
        """Return a view that asks Slurm about the sweep's jobs, if it has any and Slurm is here."""
        return View(sweep, queue=slurm_queue(sweep))

    def __init__(
        self,
        sweep: Sweep,
        silent: frozenset[Path] = frozenset(),
        queue: Queue | None = None,
        remember_seconds: float = 0.0,
        thorough: bool = True,
    ) -> None:
        """Set up the caches.

        Without `thorough`, only what a choice needs is read: no claims of ended trials, and no
        configuration before `check`.

        `silent` are claims on other hosts that a `claims.Watch` found dead. `queue` answers for
        owners in Slurm jobs. A state stays cached for `remember_seconds`, or until `look_again`.
        """
        self._remember = remember_seconds
        self._states: dict[str, tuple[float, TrialState]] = {}
        self._damage = Damage()
        self._thorough = thorough
        self._checked: set[tuple[str, bool]] = set()
        self.sweep = sweep
        self.watch = claims.Watch(silent, queue=queue)
        self._runs: dict[str, RunFolder] = {}
        self._hours: dict[str, float] = {}
        self._followed = 0  # modification time of the last sweep.json read, in ns
        self._faults = 0  # the same of the folder of faults
        self._results: dict[str, RunResult] = {}
        self._claims: dict[str, list[claims.Claim]] = {}
        self._settled: set[str] = set()  # trials whose claims were read after their results
        self._losses: dict[str, LossCurve] = {}
        # sacct's record of each job, or None if it had none
        self.accounted: dict[str, JobUse | None] = {}
        self.accounting = ""  # "answers", "silent" or "none"; "" until sacct is asked
        # Of unfinished runs, with the file offset read so far and the inode of the file.
        self._probes: dict[str, tuple[dict[str, dict[str, float]], int, int]] = {}

    def follow(self) -> bool:
        """Read what a command changed in a search; return False if it is another search now."""
        if self.sweep.search is None:
            return True
        written = (self.sweep.path / "sweep.json").stat().st_mtime_ns
        if written == self._followed:
            return True
        now = Sweep.load(self.sweep.path)
        if now.search is None or now.search.digest != self.sweep.search.digest:
            return False
        self.sweep, self._followed = now, written
        # A command may have set a trial aside to run it, or its probes, again.
        self._results = {s: r for s, r in self._results.items() if r.status is RunStatus.completed and not r.missing}
        self._states.clear()
        self._hours.clear()
        self._checked.clear()
        return True

    def _forget_reopened(self) -> None:
        """Read failed results again if, since they were read, a fault may have been found a node's."""
        if (changed := self.sweep.nodes.changed) != self._faults:
            self._faults = changed
            for signature in [s for s, r in self._results.items() if r.status is RunStatus.failed]:
                del self._results[signature]
                self._states.pop(signature, None)
                self._hours.pop(signature, None)
                self._settled.discard(signature)

    def look_again(self) -> None:
        """Forget the states of unfinished and damaged trials: the next decision needs fresh ones."""
        self._forget_reopened()
        self._states = {s: known for s, known in self._states.items() if known[1].final}
        self._checked.clear()

    def _run(self, trial: Trial) -> RunFolder:
        """Return the run folder of the trial, cached because one choice looks at thousands."""
        if trial.signature not in self._runs:
            self._runs[trial.signature] = self.sweep.run(trial)
        return self._runs[trial.signature]

    def result(self, trial: Trial) -> RunResult | None:
        """Return the trial's result, or None if it has none yet or is damaged."""
        if self._damage.of(trial.signature):
            return None
        found = self._results.get(trial.signature)
        if found is None:
            run = self._run(trial)
            found = self._damage.guard(run.path, run.result, None)
            found = with_objective(found, self.sweep.objective) if found is not None else None
        if found is not None:
            self._results[trial.signature] = found
        return found

    def state(self, trial: Trial) -> TrialState:
        """Return the trial's current state."""
        known = self._states.get(trial.signature)
        if known is None or (not known[1].final and time.monotonic() - known[0] >= self._remember):
            known = time.monotonic(), self._look(trial)
            self._states[trial.signature] = known
        return known[1]

    def damage(self, trial: Trial) -> str:
        """Return 'damaged: <file>: <what to do>' if the trial is damaged, else ""."""
        return self._damage.of(trial.signature)

    def unlisted(self) -> list[str]:
        """Return the run folders that belong to no trial of the sweep."""
        known = {t.signature for t in self.sweep.trials}
        return sorted(p.name for p in (self.sweep.path / "trials").glob("[!.]*") if p.name not in known)

    def check(self, trial: Trial, begins: bool = True) -> bool:
        """Return whether a command may write into the trial's folder; if not, it is damaged.

        If a run `begins` there, a configuration that it holds must be the trial's.
        """
        if (trial.signature, begins) not in self._checked:
            run = self._run(trial)
            self._damage.guard(run.path, lambda: run.check(trial.values if begins else None), None)
            if self.damage(trial):
                return False
            self._checked.add((trial.signature, begins))
        return True

    def _look(self, trial: Trial) -> TrialState:
        self._damage.forget(trial.signature)
        state = self._damage.guard(self._run(trial).path, lambda: self._read_state(trial), TrialState.damaged)
        if self._thorough and not self.damage(trial):
            self.check(trial, begins=state in (TrialState.waiting, TrialState.interrupted))
            if state.ended:
                self.claims(trial)
        return TrialState.damaged if self.damage(trial) else state

    def _read_state(self, trial: Trial) -> TrialState:
        result = self.result(trial)
        if result is not None:
            return TrialState[result.status.name]
        folder = self._run(trial).path
        names = claims.listing(folder)
        past = self._claims_among(trial, names)
        if not past:
            return TrialState.cancelled if claims.is_cancelled(folder, names) else TrialState.waiting
        return OF_STANDING[self.watch.standing(folder, past[-1], names)]

    def _claims_among(self, trial: Trial, names: frozenset[str]) -> list[claims.Claim]:
        """Return the claims named in a listing. No claim is read twice."""
        past = claims.history(self._run(trial).path, names, self._claims.get(trial.signature, ()))
        self._claims[trial.signature] = past
        return past

    def judged_claims(self, trial: Trial) -> list[claims.Claim]:
        """Return the claims behind the last computed state, without reading the disk."""
        return self._claims.get(trial.signature, [])

    def claims(self, trial: Trial) -> list[claims.Claim]:
        """Return all claims of the trial, oldest first. An ended trial is not read again."""
        # If a trial began and ended between two looks, it has a result but no cached claims.
        if trial.signature not in self._settled and not self.damage(trial):
            ended, folder = trial.signature in self._results, self._run(trial).path
            self._damage.guard(folder, lambda: self._claims_among(trial, claims.listing(folder)), None)
            if ended and not self.damage(trial):
                self._settled.add(trial.signature)
        return [] if self.damage(trial) else self._claims[trial.signature]

    def states(self) -> dict[str, TrialState]:
        """Return the state of each trial by run ID, including trials chosen meanwhile."""
        self.sweep.grow()
        self._forget_reopened()
        return {t.signature: self.state(t) for t in self.sweep.trials}

    def hosts_elsewhere(self) -> list[str]:
        """Return the other hosts (or containers) whose processes own running trials."""
        unfinished = [t for t in self.sweep.trials if self.state(t) is TrialState.running]
        owners = [c.owner for t in unfinished for c in self.claims(t)[-1:]]
        return sorted({o.host for o in owners if not o.is_local})

    def device_hours(self, trial: Trial) -> float:
        """Return the cost of an ended trial in device hours.

        In Slurm this is the time its jobs held GPUs, lost steps included; elsewhere the training
        time.
        """
        if trial.signature not in self._hours:
            folder, past, result = self._run(trial).path, self.claims(trial), self.result(trial)
            if self.damage(trial):
                return 0.0
            held = sum(claims.held_seconds(folder, c) * c.slurm.gpus / 3600 for c in past if c.slurm)
            self._hours[trial.signature] = held or (result.device_hours if result is not None else 0.0)
        return self._hours[trial.signature]

    def probes(self, trial: Trial) -> dict[str, dict[str, float]]:
        """Return epoch -> metrics of the probes so far. Only new lines are read."""
        result = self.result(trial)
        if result is not None:
            return result.probes
        # A resumed run rewrites the same records after its checkpoint, so cached ones stay valid.
        known, start, inode = self._probes.get(trial.signature, ({}, 0, 0))
        path = self._run(trial).records
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            found = path.stat()
            if found.st_size < start or found.st_ino != inode:
                start, inode = 0, found.st_ino
        more, end = self._damage.guard(path.parent, lambda: read_probes(path, start), None) or ({}, start)
        self._probes[trial.signature] = {**known, **more}, end, inode
        return self._probes[trial.signature][0]

    def records(self, trial: Trial, last_bytes: int | None = None) -> list[dict[str, Any]]:
        """Return the records of a trial so far, or those in the last bytes of its file."""
        run = self._run(trial)
        return self._damage.guard(run.path, lambda: read_metrics(run.records, last_bytes), None) or []

    def losses(self, trial: Trial, share: float) -> LossCurve:
        """Return the losses of an unfinished trial, at least of its last `share`.

        `share` is in [0, 1]. Only new lines are read.
        """
        curve = self._losses.setdefault(trial.signature, LossCurve(trial.epochs))
        path = self._run(trial).path / "metrics.jsonl"
        self._damage.guard(path.parent, lambda: curve.read(path, share), None)
        return curve

    def at_rungs(self, trial: Trial) -> dict[int, float]:
        """Return rung -> objective of a trial's probe there, if it has a value. A rung is one of the sweep's `rungs`."""
        probes, objective, own = self.probes(trial), self.sweep.objective, self.sweep.rungs_of(trial)
        values = {r: probes.get(str(e), {}).get(objective) for r, e in zip(self.sweep.rungs[len(self.sweep.rungs) - len(own) :], own)}
        return {rung: value for rung, value in values.items() if value is not None}

    def rung_values(self, rung: int, seed: int) -> dict[str, float]:
        """Return run ID -> objective at a rung, one of the sweep's `rungs`, for trials of `seed` with a value there."""
        found = {t.signature: self.at_rungs(t).get(rung) for t in self.sweep.trials if t.seed == seed}
        return {signature: value for signature, value in found.items() if value is not None}

    def objective(self, trial: Trial) -> float | None:
        """Return the value by which the trial is ranked, or None."""
        result = self.result(trial)
        return None if result is None else result.metrics.get(self.sweep.objective)

    def reached_step(self, trial: Trial) -> int:
        """Return the step from which the trial could resume now; of one that saves elsewhere, what it has reported."""
        found = checkpoint.find(self.sweep.run(trial).checkpoints)
        return found[0].step if found else progress.read(self.sweep.trial_dir(trial)).step
