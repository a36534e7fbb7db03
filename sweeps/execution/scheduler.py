"""Choose a worker's next trial, and decide at each probe if it goes on. Needs no torch."""

from collections.abc import Callable, Iterator
from typing import Any

from cnnjepa.run.folder import RunResult, RunStatus
from cnnjepa.run.identity import fidelity, signature
from jobs.task import score_format
from sweeps.execution.bad_nodes import Place, log_of
from sweeps.search import search
from sweeps.search.warnings import cause_of, warnings_of
from sweeps.spec.rungs import goes_on
from sweeps.spec.sweep import Trial
from sweeps.state import claims
from sweeps.state.folder import Sweep
from sweeps.state.logs import log_tail
from sweeps.state.trial_state import TrialState
from sweeps.state.view import View

# Deaths in place before the fault is the trial's own. The machine gets a second chance.
CRASHES_ALLOWED = 2
# Jobs that may gain no step. Preemption, node loss and time limits are not the trial's fault.
STARTS_ALLOWED = 10


def fault(view: View, trial: Trial, past: list[claims.Claim], step: int, driver: str) -> str:
    """Return why a half-done trial must not start again, or "" if it may."""
    folder = view.sweep.trial_dir(trial)
    log, said = log_of(folder, past[-1]), view.sweep.nodes.hang_of(trial.signature, past[-1].attempt)
    if claims.crashes_in_place(past, step, driver, folder) >= CRASHES_ALLOWED:
        return f"its process died {CRASHES_ALLOWED} times at step {step} without gaining a step: {said or log_tail(log)}; see {log}"
    if claims.starts_in_vain(past, step, folder) >= STARTS_ALLOWED:
        return f"{STARTS_ALLOWED} jobs made no progress after step {step}; is the time limit too short? {log_tail(log)}; see {log}"
    return ""


def runnable(trial: Trial) -> bool:
    """Return whether this code gives the trial its run ID. If not, other code must run it."""
    return trial.known_config is not None and signature(trial.known_config) == trial.signature


def next_claim(
    view: View, driver: str, start: claims.SlurmStart | None = None, place: Place | None = None
) -> tuple[Trial, claims.Ownership] | None:
    """Claim a trial; return None if nothing can begin here now.

    Half-done trials without an owner come before new ones, and a requeued job finds its own trial
    first. A trial with a `fault` is recorded as failed, a damaged one is left to a person. States
    cached in `view` are read again. Raise NodeFaultError if nothing is to begin at `place`.
    """
    sweep = view.sweep
    view.look_again()
    sweep.grow()
    if place is not None:
        place.require_sound(view)
    # Use the claims behind the state: after a newer claim, a living owner would lose its trial.
    half_done = [(view.judged_claims(t), t) for t in sweep.trials if view.state(t) is TrialState.interrupted and runnable(t)]
    mine = start.job if start else ""
    if place is not None and half_done:
        for past, trial in half_done:
            place.note_death(view, trial, past, view.reached_step(trial), driver)
        place.require_sound(view)
    for past, trial in sorted(half_done, key=lambda found: not (found[0][-1].slurm and found[0][-1].slurm.job == mine)):
        if not view.check(trial):
            continue
        folder, step = sweep.trial_dir(trial), view.reached_step(trial)
        cause = fault(view, trial, past, step, driver)
        if cause:
            run = sweep.run(trial)
            run.write_result(RunResult(RunStatus.failed, cause, probes=view.probes(trial), step=step, claim=past[-1].attempt))
            if mine and past[-1].slurm and past[-1].slurm.job == mine and not past[-1].slurm.shared:
                return None  # should the fault be this node's, do not try the next trial on it
            continue
        # Its owner may have ended it between the look at the result and that at the claims.
        if sweep.run(trial).result() is not None:
            continue
        owned = claims.claim(folder, past[-1].attempt + 1, driver, step, start)
        if owned:
            return trial, owned
    for fresh in not_begun(view):
        owned = claims.claim(sweep.trial_dir(fresh), 1, driver, 0, start) if runnable(fresh) and view.check(fresh) else None
        if owned and claims.is_cancelled(sweep.trial_dir(fresh)):  # cancelled while it was chosen
            with owned:
                continue
        if owned:
            return fresh, owned
    return None


def not_begun(view: View) -> Iterator[Trial]:
    """Yield the pending trials in the order of the sweep; a search then chooses further ones."""
    # A search has some too: the baseline, and those whose worker died before it began them.
    yield from [t for t in view.sweep.trials if view.state(t) is TrialState.waiting]
    while view.sweep.search is not None and (chosen := search.begin(view)) is not None:
        yield chosen


def probed_at_rungs(sweep: Sweep, trial: Trial) -> Any:
    """Return the configuration to train, with a probe at each of the trial's own rungs."""
    return sweep.task.probed_at(trial.config, sweep.rungs_of(trial)) if sweep.varies_epochs else trial.config


def judge(view: View, trial: Trial) -> Callable[[int, dict[str, float]], str]:
    """Return the function that decides at each probe whether a run of `trial` goes on.

    It returns "" or the cause to end the run: a warning that the sweep prunes on, or a rung at
    which the run is not among the best. A probe without a value does not end a run.
    """
    sweep = view.sweep

    def verdict(epoch: int, metrics: dict[str, float]) -> str:
        for warning in warnings_of(view, trial, {str(epoch): metrics}) if sweep.prune_on else ():
            if warning.name in sweep.prune_on:
                return cause_of(warning)
        value, own = metrics.get(sweep.objective), sweep.rungs_of(trial)
        if value is None or epoch not in own or not search.is_judged(sweep, trial):
            return ""
        sweep.grow()
        others = view.rung_values(sweep.rungs[own.index(epoch) - len(own)], trial.seed)
        others.pop(trial.signature, None)
        if goes_on(sweep.sign * value, [sweep.sign * other for other in others.values()], sweep.eta):
            return ""
        shown, what = f"{value:{score_format(sweep.task.UNIT)}}", fidelity(trial.values).removesuffix("s")
        return f"{sweep.objective} {shown} at {what} {epoch} is not among the best 1/{sweep.eta} of {len(others) + 1} runs"

    return verdict
