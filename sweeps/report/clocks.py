"""Read when trials began, did their last step and ended, and estimate from it how long the sweep still takes."""

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from cnnjepa.run import pace
from cnnjepa.run.folder import RunResult, RunStatus
from sweeps.report.remaining import Ended, Remaining, Running, Waiting
from sweeps.search.search import FINALISTS, Outlook
from sweeps.spec.sweep import Trial
from sweeps.state import claims
from sweeps.state.folder import Sweep
from sweeps.state.trial_state import TrialState
from sweeps.state.view import View

_TAILS = 40  # completed trials of which the time after the last step is read


@dataclass(frozen=True)
class Clock:
    """Times of a trial, in seconds since 1970; 0 if unknown or not yet."""

    seconds: float = 0.0  # for which it has held a worker, over all attempts
    start: float = 0.0  # of the last attempt
    end: float = 0.0
    beat: pace.Beat | None = None  # of a running trial: its last sign of progress

    @property
    def phase(self) -> str:
        """Return what a running trial does: starting, training, probing or saving; "" if unknown."""
        return self.beat.phase if self.beat is not None else ""

    @property
    def last_step(self) -> float:
        """Return when its last step was done."""
        return self.beat.last_step if self.beat is not None else 0.0


# Of each view, the clocks of ended trials, with the results that they belong to.
_ENDED: WeakKeyDictionary[View, dict[str, tuple[RunResult, Clock]]] = WeakKeyDictionary()


def clock_of(view: View, trial: Trial, state: TrialState, past: Sequence[claims.Claim]) -> Clock:
    """Return the times of a trial with these claims. Those of an ended one are read once."""
    result = view.result(trial) if state.ended else None
    known = _ENDED.setdefault(view, {})
    if result is not None and (found := known.get(trial.signature)) is not None and found[0] is result:
        return found[1]
    folder = view.sweep.trial_dir(trial)
    if result is not None:
        known[trial.signature] = result, _of_ended(view, trial, result, past)
        return known[trial.signature][1]
    if not past:
        return Clock()
    if state is not TrialState.running:
        return Clock(sum(claims.held_seconds(folder, c) for c in past), past[-1].time)
    held = sum(claims.held_seconds(folder, c) for c in past[:-1]) + max(time.time() - past[-1].time, 0.0)
    return Clock(held, past[-1].time, beat=pace.read(pace.file_of(folder, past[-1].attempt)))


def _of_ended(view: View, trial: Trial, result: RunResult, past: Sequence[claims.Claim]) -> Clock:
    run = view.sweep.run(trial)
    if not past or past[-1].attempt != result.claim:  # made by an earlier version, or brought here from elsewhere
        return Clock(result.seconds, 0.0, run.ended_at())
    end = run.ended_at()
    held = sum(claims.held_seconds(run.path, c) for c in past[:-1]) + max(end - past[-1].time, 0.0)
    return Clock(held, past[-1].time, end)


def _ended(view: View, trial: Trial, tail: bool) -> Ended | None:
    """Return what an ended trial says about the time of others; with `tail`, how long it took after its last step."""
    result, clock = _ENDED.get(view, {}).get(trial.signature, (None, Clock()))
    if result is None or not clock.seconds:
        return None
    completed, after = result.status is RunStatus.completed, None
    if tail and completed:
        beat = pace.read(pace.file_of(view.sweep.trial_dir(trial), result.claim))
        after = max(clock.end - beat.stepped, 0.0) if beat is not None and beat.stepped else None
    share = max(map(float, result.probes), default=0.0) / trial.epochs if result.status is RunStatus.pruned and trial.epochs else None
    return Ended(trial.configuration, trial.epochs, clock.seconds, completed, share, after, clock.start, clock.end)


def running_of(view: View, trial: Trial, clock: Clock, steps: Sequence[Mapping[str, Any]], first_step: int) -> Running:
    """Return what is known of a running trial.

    `steps` are its last records of steps, oldest first. `first_step` is where its attempt began.
    """
    now, judged = time.time(), _may_end_early(view.sweep, trial)
    if not steps or not trial.epochs:
        return Running(trial.configuration, trial.epochs, 0.0, clock.seconds, judged=judged, start=clock.start)
    last, began = steps[-1], clock.beat.began if clock.beat is not None else 0.0
    share, recorded = min(float(last["epoch"]) / trial.epochs, 1.0), 0.0
    with suppress(OSError):
        recorded = view.sweep.run(trial).records.stat().st_mtime
    trained = max(share * (1.0 - first_step / max(last["step"], 1)), 0.0)
    training = max(recorded - (began or clock.start), 0.0)
    if clock.phase == "training" and trained > 0 and training > 0 and len(steps) > 1:
        # Since that record it has trained on, but not beyond the next one.
        interval = share - float(steps[-2]["epoch"]) / trial.epochs
        share = min(share + max(min((now - recorded) * trained / training, interval), 0.0), 1.0)
    since = now - clock.last_step if clock.last_step else 0.0
    return Running(trial.configuration, trial.epochs, share, clock.seconds, trained, training, since, judged, clock.start)


def _may_end_early(sweep: Sweep, trial: Trial) -> bool:
    """Return whether what ended other trials early may end this one; a search lets the further seeds of a leader end."""
    return sweep.search is None or bool(sweep.prune_on) or trial.number == trial.configuration_number


def estimated(
    view: View, trials: Sequence[dict[str, Any]], running: Mapping[str, Running], workers: int, outlook: Outlook | None
) -> float | None:
    """Return the time left of the sweep in seconds, None if unknown, and set `seconds_left` of each running trial.

    `trials` are the states of the first trials of the sweep, and `running` those of them that run, by run ID. `workers` is how
    many trials run at once if that is known, else 0. `outlook` is that of a search.
    """
    listed = list(zip(view.sweep.trials, trials, strict=False))
    done = [trial for trial, t in listed if TrialState[t["state"]].ended]
    tails = {t.signature for t in done[-_TAILS:]}
    found = Remaining([e for t in done if (e := _ended(view, t, t.signature in tails)) is not None], list(running.values()))
    for t in trials:
        t["seconds_left"] = found.of(running[t["signature"]]) if t["signature"] in running else None
    waiting = [
        Waiting(trial.configuration, trial.epochs, t["done"], _may_end_early(view.sweep, trial))
        for trial, t in listed
        if t["state"] in ("waiting", "interrupted", "requeued")
    ]
    rounds: list[int] = []
    if outlook is not None:
        usual = sum(trial.epochs for trial, _ in listed) / len(listed)
        waiting += [Waiting("", usual, judged=not outlook.seeds_due)] * outlook.to_begin
        rounds = _rounds(outlook)
    return found.of_sweep(waiting, max(workers, len(running)), rounds)


def _rounds(outlook: Outlook) -> list[int]:
    """Return how many further seeds follow, round by round, when what may begin now has ended."""
    if outlook.sweep.cancelled or outlook.stopped:
        return []
    if outlook.untried or any(p.pending for p in outlook.tried if len(p.trials) == 1):
        return [FINALISTS + 1] * (outlook.search.seeds - 1)
    most = max(len(p.trials) for p in outlook.tried) + bool(outlook.seeds_due)
    return [FINALISTS + 1] * max(outlook.search.seeds - most, 0)
