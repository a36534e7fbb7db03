"""Signs that a run comes to nothing, said while it could still be stopped: features that lose their spread, a falling score, a flat loss.

Each is read off the probes on the way and the recorded losses, against the thresholds of `warnings` in the run's configuration. A run whose
features fall further, below those of `probes`, is failed by its own probe: cnnjepa/probes/collapse.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from cnnjepa.config import WarningConfig
from cnnjepa.run.folder import RunStatus
from cnnjepa.run.losses import LossCurve
from sweeps.spec.sweep import Trial
from sweeps.state.folder import Sweep, View

# Name -> the probe without which it is never said; the loss needs none.
NEEDS = {"feature_std": "collapse", "rankme": "collapse", "knn": "knn", "loss": ""}
PRUNED = "warning "  # how the cause of a run begins that was pruned for one
Probes = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class EarlyWarning:
    """One sign: what was seen at which epoch, the value and what it is held against, and what to do."""

    name: str
    epoch: float
    value: float
    threshold: float
    seen: str
    advice: str

    @property
    def line(self) -> str:
        """All of it, as a person reads it."""
        return f"{self.name}: {self.seen}; {self.advice}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "line": self.line}


def of_features(probes: Probes, limits: WarningConfig, collapsed_std: float) -> list[EarlyWarning]:
    """The warnings of the last probe's features: their spread, and how many directions they use."""
    ordered = sorted(probes, key=float)
    if not ordered:
        return []
    epoch, last, found = ordered[-1], probes[ordered[-1]], []
    std, rank = last.get("collapse.feature_std"), last.get("collapse.rankme")
    if std is not None and collapsed_std <= std < limits.feature_std:
        seen = f"collapse.feature_std is {std:.3g} at epoch {epoch}, below {limits.feature_std:g} (1 is an even spread)"
        advice = f"below {collapsed_std:g} it is failed: a lower optimizer.lr, or a target that moves more slowly"
        found.append(EarlyWarning("feature_std", float(epoch), std, limits.feature_std, seen, advice))
    earlier = {e: probes[e]["collapse.rankme"] for e in ordered[:-1] if "collapse.rankme" in probes[e]}
    best = max(earlier, key=lambda e: earlier[e], default=None)
    share = limits.rankme_share * earlier[best] if best is not None else 0.0
    limit = max(limits.rankme, share)
    if rank is not None and rank < limit:
        of = f"{limits.rankme_share:g} of the {earlier[best]:.3g} at epoch {best}" if best is not None and share == limit else "the floor"
        seen = f"collapse.rankme is {rank:.3g} at epoch {epoch}, below {limit:.3g}, {of}"
        advice = "the features keep to fewer directions: look at the masks, the EMA momentum and optimizer.lr"
        found.append(EarlyWarning("rankme", float(epoch), rank, limit, seen, advice))
    return found


def of_knn(probes: Probes, limits: WarningConfig) -> list[EarlyWarning]:
    """The warning of a held-out k-NN score that has fallen and stays down."""
    key = "knn.holdout_top1"
    scores = [(e, probes[e][key]) for e in sorted(probes, key=float) if key in probes[e]]
    before, last = scores[: -limits.knn_probes], scores[-limits.knn_probes :]
    if not before:
        return []
    (best_epoch, best), (epoch, value) = max(before, key=lambda s: s[1]), max(last, key=lambda s: s[1])
    limit = best - limits.knn_drop
    if value >= limit:
        return []
    which = f"at best {value:.1f} in the last {len(last)} probes" if len(last) > 1 else f"{value:.1f} at epoch {epoch}"
    seen = f"{key} is {which}, more than {limits.knn_drop:g} below the {best:.1f} at epoch {best_epoch}"
    advice = "the features get worse: stop it, or take a lower optimizer.lr"
    return [EarlyWarning("knn", float(last[-1][0]), value, limit, seen, advice)]


def of_loss(curve: LossCurve, limits: WarningConfig, peak_lr: float, warmup_epochs: float) -> list[EarlyWarning]:
    """The warning of a loss that stands still although the learning rate is still high.

    Noise that could hide a change is no standstill; nor is a rise, which a method with a target of its own may show while its features get
    better: I-JEPA on digits does, by a fifth.
    """
    halves = curve.halves(limits.plateau_share, warmup_epochs)
    if halves is None or curve.lr < limits.plateau_lr * peak_lr:
        return []
    before, after, error = halves
    if not before:  # nothing is trained
        return []
    gained, uncertain = (before - after) / abs(before), 2 * error / abs(before)
    if abs(gained) + uncertain >= limits.plateau_change:
        return []
    what = f"the mean loss fell by {100 * gained:.2f} ± {100 * uncertain:.2f} %"
    over = f"over the last {100 * limits.plateau_share:g} % of the run, until epoch {curve.epoch:.4g}"
    seen = f"{what} {over}, a change of less than {100 * limits.plateau_change:g} %"
    advice = "more epochs at this optimizer.lr gain nothing: another rate, or fewer epochs"
    return [EarlyWarning("loss", curve.epoch, abs(gained), limits.plateau_change, seen, advice)]


def early_warnings(probes: Probes, curve: LossCurve | None, values: Mapping[str, Any]) -> list[EarlyWarning]:
    """All warnings of a run with these probes and losses, by the thresholds of its configuration `values`; no curve, no warning of it."""
    given = values["warnings"]
    limits = WarningConfig(**{f.name: given[f.name] for f in fields(WarningConfig) if f.name in given})
    found = of_features(probes, limits, values["probes"]["collapsed_std"]) + of_knn(probes, limits)
    optimizer = values["optimizer"]
    return found + (of_loss(curve, limits, optimizer["lr"], optimizer["warmup_epochs"]) if curve is not None else [])


def warnings_of(view: View, trial: Trial, probed: Probes | None = None) -> list[EarlyWarning]:
    """What there is to be said of a trial now, an ended one by its probes; `probed` are probes of which the folder may not tell yet."""
    result = view.result(trial)
    probes = {**view.probes(trial), **(probed or {})}
    if result is not None and result.status is RunStatus.completed:
        probes[str(trial.epochs)] = result.metrics
    return early_warnings(probes, None if result is not None else view.losses(trial), trial.values)


def told(sweep: Sweep, lines: Mapping[str, Sequence[str]], most: int = 8) -> list[str]:
    """'warning: depth 2, seed 42: ...' for each line of each trial by signature, no more than `most`, and how many there are beyond."""
    every = [f"warning: {t.setting}, seed {t.seed}: {line}" for t in sweep.trials for line in lines.get(t.signature, ())]
    more = [f"and {len(every) - most} warnings more, see --json"] if len(every) > most else []
    return every[:most] + more


def cause_of(warning: EarlyWarning) -> str:
    """Why a run that is ended for `warning` was pruned."""
    return f"{PRUNED}{warning.name}: {warning.seen}"


def pruned_for(cause: str) -> str:
    """The name of the warning for which a run with that cause was pruned; "" where it was another reason."""
    return cause.removeprefix(PRUNED).partition(":")[0] if cause.startswith(PRUNED) else ""


def check_pruning(sweep: Sweep) -> None:
    """Raise ValueError where a trial could not be pruned by what the sweep prunes on: an unknown name, or no probe on its way."""
    for name in sweep.prune_on:
        if name not in NEEDS:
            raise ValueError(f"--prune-on must hold names out of {', '.join(NEEDS)}; got {name}")
        for trial in sweep.trials:
            probes, epochs = trial.values["probes"], trial.epochs
            if NEEDS[name] and NEEDS[name] not in probes["names"]:
                raise ValueError(f"probes.names must hold {NEEDS[name]} to prune on {name}; got {', '.join(probes['names']) or 'none'}")
            if not 0 < probes["every_epochs"] < epochs and not any(epoch < epochs for epoch in probes["at_epochs"]):
                rule = f"give a probe before epoch {epochs} to prune on {name}, which is asked at probes"
                raise ValueError(f"probes.every_epochs or probes.at_epochs must {rule}; got none: add 'probes.at_epochs=[{epochs // 2}]'")
