"""Say what a command waits for when it stops."""

from cnnjepa.run import pace
from cnnjepa.run.saver import PATIENCE_AT_STOP_SECONDS
from sweeps.report.board import duration
from sweeps.state.trial_state import TrialState
from sweeps.state.view import View


def saving(view: View) -> str:
    """Return 'saving 3 trials, up to 61 s' for a sweep whose workers were asked to stop.

    Each ends its step and saves, for which a disk that refuses has PATIENCE_AT_STOP_SECONDS. One that
    probes or loads its data ends that first, and nobody knows how long that takes.
    """
    beats = []
    for trial in view.sweep.trials:
        if view.state(trial) is TrialState.running and (past := view.claims(trial)):
            beats.append(pace.read(pace.file_of(view.sweep.trial_dir(trial), past[-1].attempt)))
    if not beats:
        return "stopping the workers"
    many = f"saving {len(beats)} trial{'s' * (len(beats) > 1)}"
    busy = [b.phase for b in beats if b is not None and b.phase in ("probing", "starting")]
    first = ", ".join(f"{busy.count(what)} still {what}" for what in dict.fromkeys(busy))
    step = max((b.usual for b in beats if b is not None), default=0.0)
    return f"{many}, {f'of which {first}' if busy else f'up to {duration(step + PATIENCE_AT_STOP_SECONDS)}'}"
