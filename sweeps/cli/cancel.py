"""Cancel trials: mark their folders, so that no worker takes them, and then end their jobs."""

from jobs.slurm import queue as slurm
from sweeps.execution.slurm_array import SlurmEngine
from sweeps.spec.sweep import Trial
from sweeps.state import claims
from sweeps.state.place import Place
from sweeps.state.trial_state import TrialState
from sweeps.state.view import View


def cancel(view: View, trials: list[Trial]) -> str:
    """Cancel `trials`, or all that are unfinished if empty; return one line with what was done."""
    sweep = view.sweep
    if not trials:
        sweep.cancel()
    chosen = [t for t in trials or sweep.trials if not view.state(t).settled]
    jobs = []
    for trial in chosen:
        state, past = view.state(trial), view.claims(trial)
        claims.cancel(sweep.trial_dir(trial))
        job = past[-1].slurm if past and state in (TrialState.running, TrialState.requeued) else None
        if job is not None and job.place(sweep.path) is not Place.here:
            continue  # it is a job of the folder that this one is a copy of, or was before it was moved
        # A worker of a shared job stops by itself and takes another trial, one on another cluster stops.
        elsewhere = job is not None and view.watch.queue is not None and view.watch.queue.is_elsewhere(job.cluster)
        if job is not None and not job.shared and not elsewhere:
            jobs.append(job.job)
    ended = len(jobs)
    engine = SlurmEngine.of(sweep, view.watch.queue) if view.watch.queue is not None else None
    if engine is not None:
        if trials:
            slurm.cancel(jobs)
            ended += engine.withdraw(-engine.missing(View(sweep, queue=engine.queue)))
        else:
            live = [e.id for e in engine.live()]
            slurm.cancel(live)
            slurm.cancel_named([made.name for made in engine.in_doubt()])
            ended = len(live)
    return f"{len(chosen)} trials cancelled, {ended} jobs ended; run the sweep's command to resume them"
