"""Resolve the names of metrics when a sweep is planned: objective, headline, costs, the paper's figures."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from cnnjepa.run.command_line import did_you_mean
from sweeps.report.aggregate import COSTS
from sweeps.spec.sweep import ScaleName, SweepSpec
from sweeps.state.folder import Sweep

_SHOWN = 8  # names in a message


def check_metrics(spec: SweepSpec, sweep: Sweep) -> None:
    """Raise ValueError at a name that no run of the sweep can have, as far as the task knows its metrics."""
    task, costs = sweep.task, [c for c in COSTS if c not in ("pretraining_hours", "evaluation_hours") or "batch" in sweep.task.KEYS]
    every: list[str] | None = []
    for trial in {repr(task.metrics(t.values)): t for t in reversed(sweep.trials)}.values():
        task.check_objective(sweep.objective, trial.values)
        known = task.metrics(trial.values)
        of = f" of {trial.label}" if sweep.search is None else ""
        _require(sweep.objective, known, "objective", f"the probes{of} give")
        every = None if known is None or every is None else [*every, *known]
        if sweep.rungs and not _given(sweep.objective, during := task.metrics(trial.values, final=False)):
            rule = f"objective must be given during training for early stopping; got {sweep.objective}"
            raise ValueError(f"{rule}{did_you_mean(sweep.objective, during or ())}, or give --early-stopping none")
    for metric in spec.headline or ():
        _require(metric, every, "headline", "the probes give")
    for cost in spec.costs:
        _require(cost, costs, "costs", "results.csv has")
    # Images without labels are scored on other data alone: the paper's figures then stand beside no value.
    elsewhere = {(m.partition(".")[0], m.rpartition(".")[2]) for m in every or ()}
    for key in dict.fromkeys(key for c in spec.configurations_at(spec.scale(sweep.scale)) for key in c.paper):
        probe, probes = key.partition(".")[0], [m.partition(".")[0] for m in every or ()]
        if (probe, key.rpartition(".")[2]) in elsewhere:
            continue
        # At smoke scale the paper's figures are not shown, and a probe may be left out.
        if sweep.scale is ScaleName.paper or probe in probes or "." not in key or did_you_mean(probe, probes):
            _require(key, None if every is None else [*every, *costs], "paper", "the probes give, or a cost")
    keys = [key for c in spec.configurations_at(spec.scale(sweep.scale)) for key in c.overrides]
    for key in spec.named_by if keys else ():
        if key not in keys:
            raise ValueError(f"named_by must hold keys that configurations set; got {key}{did_you_mean(key, keys)}")


def _given(metric: str, known: Iterable[str] | None) -> bool:
    return known is None or any(fnmatchcase(metric, pattern) for pattern in known)


def _require(metric: str, known: Sequence[str] | None, what: str, whose: str) -> None:
    if _given(metric, known):
        return
    names = list(dict.fromkeys(known or ()))
    hint = did_you_mean(metric, names) or f": write one of {', '.join(names[:_SHOWN])}{' ...' if len(names) > _SHOWN else ''}"
    raise ValueError(f"{what} must be a metric that {whose}; got {metric}{hint if names else ', and no probe is configured'}")
