"""Early warnings of a sweep's runs: find them, print them, and prune runs for them."""

from collections.abc import Mapping, Sequence
from functools import partial

from cnnjepa.run.command_line import did_you_mean
from cnnjepa.run.folder import EarlyWarning, RunStatus
from jobs.task import Probes, task_of
from sweeps.spec.sweep import Trial
from sweeps.state.folder import Sweep
from sweeps.state.view import View

PRUNED = "warning "  # prefix of the cause of a run that a warning pruned


def warnings_of(view: View, trial: Trial, probed: Probes | None = None) -> list[EarlyWarning]:
    """Return the warnings of a trial; `probed` adds probes that its folder may not hold yet."""
    result = view.result(trial)
    probes = {**view.probes(trial), **(probed or {})}
    if result is not None and result.status is RunStatus.completed:
        probes[str(trial.epochs)] = result.metrics
    losses = None if result is not None else partial(view.losses, trial)
    return task_of(trial.values).warnings(trial.values, probes, losses)


def as_lines(sweep: Sweep, lines: Mapping[str, Sequence[str]], most: int = 8) -> list[str]:
    """Return at most `most` lines 'warning: depth 2, seed 42: ...', and how many more there are."""
    every = [f"warning: {t.name}: {line}" for t in sweep.trials for line in lines.get(t.signature, ())]
    more = [f"and {len(every) - most} more warnings, see --json"] if len(every) > most else []
    return every[:most] + more


def cause_of(warning: EarlyWarning) -> str:
    """Return the cause to record for a run that is pruned for `warning`."""
    return f"{PRUNED}{warning.name}: {warning.seen}"


def pruned_for(cause: str) -> str:
    """Return the name of the warning that pruned a run with this cause, or ""."""
    return cause.removeprefix(PRUNED).partition(":")[0] if cause.startswith(PRUNED) else ""


def check_pruning(sweep: Sweep) -> None:
    """Raise ValueError if the sweep prunes on a warning that is unknown or that no probe raises."""
    known = sweep.task.WARNINGS
    for name in sweep.prune_on:
        if name not in known:
            rule = f"one of {', '.join(known)}" if known else "left out, as the task has no warnings"
            raise ValueError(f"--prune-on must be {rule}; got {name}{did_you_mean(name, known)}")
        for trial in sweep.trials:
            sweep.task.check_warning(name, trial.values)
