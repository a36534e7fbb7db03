"""Which trial a slot takes, and why it leaves one alone; the choice itself needs no torch."""

from collections.abc import Callable, Iterator
from pathlib import Path

from cnnjepa.run.folder import RunResult, RunStatus
from cnnjepa.run.identity import signature
from sweeps.search import search
from sweeps.search.rungs import goes_on
from sweeps.search.warnings import cause_of, warnings_of
from sweeps.spec.sweep import Trial
from sweeps.state import claims
from sweeps.state.folder import TrialState, View
from sweeps.state.logs import log_tail

# The fault is the trial's own when its process has died so often in place; a machine's hiccup gets a second chance.
CRASHES_ALLOWED = 2
# Jobs that Slurm ended (preemption, node loss, time limit) are no fault, but so many that gain no step will never gain one.
STARTS_ALLOWED = 10


def fault(view: View, trial: Trial, past: list[claims.Claim], step: int, driver: str) -> str:
    """Why a half-done trial shall not be started again, "" where it shall."""
    folder, last = view.sweep.trial_dir(trial), past[-1]
    log = Path(last.slurm.log) if last.slurm and not last.slurm.shared else folder / "log" / "train.log"
    if claims.crashes_in_place(past, step, driver, folder) >= CRASHES_ALLOWED:
        return f"its process died {CRASHES_ALLOWED} times at step {step} without gaining a step: {log_tail(log)}; see {log}"
    if claims.starts_in_vain(past, step, folder) >= STARTS_ALLOWED:
        return f"{STARTS_ALLOWED} jobs gained no step over step {step}, is the time limit too short? {log_tail(log)}; see {log}"
    return ""


def runnable(trial: Trial) -> bool:
    """Whether this code trains the trial as its signature says; one of a later version is left to later code."""
    try:
        return signature(trial.config) == trial.signature
    except (ValueError, TypeError, KeyError):
        return False


def next_claim(view: View, driver: str, start: claims.SlurmStart | None = None) -> tuple[Trial, claims.Ownership] | None:
    """Claim a trial: a half-done one whose owner is gone, else one that nobody has begun.

    Return None where nothing is to begin here now.

    All that has changed is looked at anew, once: the view may remember states until the next call.

    A job that was requeued finds its own trial first. A trial with a `fault` is recorded as failed instead.
    """
    sweep = view.sweep
    view.look_again()
    sweep.grow()
    # The claims are those that the state was judged by: with one made meanwhile a living owner would be taken over.
    half_done = [(view.judged_claims(t), t) for t in sweep.trials if view.state(t) is TrialState.interrupted and runnable(t)]
    mine = start.job if start else ""
    for past, trial in sorted(half_done, key=lambda found: not (found[0][-1].slurm and found[0][-1].slurm.job == mine)):
        folder, step = sweep.trial_dir(trial), view.reached_step(trial)
        cause = fault(view, trial, past, step, driver)
        if cause:
            run = sweep.run(trial)
            run.write_result(RunResult(RunStatus.failed, cause, probes=run.probes(), step=step, claim=past[-1].epoch))
            if mine and past[-1].slurm and past[-1].slurm.job == mine and not past[-1].slurm.shared:
                return None  # should the fault be this node's, the next trial is not tried on it too
            continue
        owned = claims.claim(folder, past[-1].epoch + 1, driver, step, start)
        if owned:
            return trial, owned
    for fresh in not_begun(view):
        owned = claims.claim(sweep.trial_dir(fresh), 1, driver, 0, start) if runnable(fresh) else None
        if owned and claims.is_cancelled(sweep.trial_dir(fresh)):  # while it was chosen
            with owned:
                continue
        if owned:
            return fresh, owned
    return None


def not_begun(view: View) -> Iterator[Trial]:
    """Yield the pending trials in the order of the sweep; a search then chooses further ones."""
    # A search has some too: chosen by a slot that did not live to begin them, and the baseline.
    yield from [t for t in view.sweep.trials if view.state(t) is TrialState.waiting]
    while view.sweep.search is not None and (chosen := search.begin(view)) is not None:
        yield chosen


def judge(view: View, trial: Trial) -> Callable[[int, dict[str, float]], str]:
    """Who says at each probe whether a run of `trial` goes on: not one of whose warnings the sweep prunes on, and at a rung the best.

    A probe without value is no reason to end it.
    """
    sweep = view.sweep

    def verdict(epoch: int, metrics: dict[str, float]) -> str:
        for warning in warnings_of(view, trial, {str(epoch): metrics}) if sweep.prune_on else ():
            if warning.name in sweep.prune_on:
                return cause_of(warning)
        value = metrics.get(sweep.objective)
        if value is None or epoch not in sweep.rungs or not search.is_judged(sweep, trial):
            return ""
        sweep.grow()
        others = view.rung_values(epoch, trial.seed)
        others.pop(trial.signature, None)
        if goes_on(value, list(others.values()), sweep.eta):
            return ""
        return f"{sweep.objective} {value:.2f} at epoch {epoch} is not among the best 1/{sweep.eta} of {len(others) + 1} runs"

    return verdict
