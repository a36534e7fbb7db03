"""Early warnings of the runs of a sweep: which runs there is something to say about, what is printed, and which it ends."""

from collections.abc import Mapping, Sequence
from functools import partial

from cnnjepa.run.folder import EarlyWarning, RunStatus
from jobs.task import Probes, task_of
from sweeps.spec.sweep import Trial
from sweeps.state.folder import Sweep, View

PRUNED = "warning "  # how the cause of a run begins that was pruned for one


def warnings_of(view: View, trial: Trial, probed: Probes | None = None) -> list[EarlyWarning]:
    """What there is to be said of a trial now, an ended one by its probes; `probed` are probes of which the folder may not tell yet."""
    result = view.result(trial)
    probes = {**view.probes(trial), **(probed or {})}
    if result is not None and result.status is RunStatus.completed:
        probes[str(trial.epochs)] = result.metrics
    losses = None if result is not None else partial(view.losses, trial)
    return task_of(trial.values).warnings(trial.values, probes, losses)


def as_lines(sweep: Sweep, lines: Mapping[str, Sequence[str]], most: int = 8) -> list[str]:
    """'warning: depth 2, seed 42: ...' for each line of each trial by run ID, no more than `most`, and how many there are beyond."""
    every = [f"warning: {t.label}, seed {t.seed}: {line}" for t in sweep.trials for line in lines.get(t.signature, ())]
    more = [f"and {len(every) - most} more warnings, see --json"] if len(every) > most else []
    return every[:most] + more


def cause_of(warning: EarlyWarning) -> str:
    """Why a run that is ended for `warning` was pruned."""
    return f"{PRUNED}{warning.name}: {warning.seen}"


def pruned_for(cause: str) -> str:
    """The name of the warning for which a run with that cause was pruned; "" where it was another reason."""
    return cause.removeprefix(PRUNED).partition(":")[0] if cause.startswith(PRUNED) else ""


def check_pruning(sweep: Sweep) -> None:
    """Raise ValueError where a trial could not be pruned by what the sweep prunes on: an unknown name, or no probe on its way."""
    known = sweep.task.WARNINGS
    for name in sweep.prune_on:
        if name not in known:
            rule = f"one of {', '.join(known)}" if known else "left out, as the task has no warnings"
            raise ValueError(f"--prune-on must be {rule}; got {name}")
        for trial in sweep.trials:
            sweep.task.check_warning(name, trial.values)
