"""Early warnings: features that lose their spread, a falling k-NN score, a flat loss.

They compare the probes and losses so far with the thresholds in `warnings` of the configuration.
Below the lower thresholds in `probes`, the run fails at the probe itself: probes/collapse.py.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from cnnjepa.config import WarningConfig
from cnnjepa.run.folder import EarlyWarning
from cnnjepa.run.losses import LossCurve

# Name -> the probe that it needs; the loss needs none.
NEEDS = {"feature_std": "collapse", "rankme": "collapse", "knn": "knn", "loss": ""}
Probes = Mapping[str, Mapping[str, float]]


def of_features(probes: Probes, limits: WarningConfig, collapsed_std: float) -> list[EarlyWarning]:
    """Return warnings about the last probe's features: their spread and number of directions."""
    ordered = sorted(probes, key=float)
    if not ordered:
        return []
    epoch, last, found = ordered[-1], probes[ordered[-1]], []
    std, rank = last.get("collapse.feature_std"), last.get("collapse.rankme")
    if std is not None and collapsed_std <= std < limits.feature_std:
        seen = f"collapse.feature_std is {std:.3g} at epoch {epoch}, below {limits.feature_std:g} (1 is an even spread)"
        advice = f"below {collapsed_std:g} the run fails: try a lower optimizer.lr, or a target that moves more slowly"
        found.append(EarlyWarning("feature_std", float(epoch), std, limits.feature_std, seen, advice))
    earlier = {e: probes[e]["collapse.rankme"] for e in ordered[:-1] if "collapse.rankme" in probes[e]}
    best = max(earlier, key=lambda e: earlier[e], default=None)
    share = limits.rankme_share * earlier[best] if best is not None else 0.0
    limit = max(limits.rankme, share)
    if rank is not None and rank < limit:
        of = f"{limits.rankme_share:g} of the {earlier[best]:.3g} at epoch {best}" if best is not None and share == limit else "the floor"
        seen = f"collapse.rankme is {rank:.3g} at epoch {epoch}, below {limit:.3g} ({of})"
        advice = "the features use fewer directions: check the masks, the EMA momentum and optimizer.lr"
        found.append(EarlyWarning("rankme", float(epoch), rank, limit, seen, advice))
    return found


def of_knn(probes: Probes, limits: WarningConfig) -> list[EarlyWarning]:
    """Return a warning if the held-out k-NN score has fallen and stays down."""
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
    advice = "the features are getting worse: stop the run, or try a lower optimizer.lr"
    return [EarlyWarning("knn", float(last[-1][0]), value, limit, seen, advice)]


def of_loss(curve: LossCurve, limits: WarningConfig, peak_lr: float, warmup_epochs: float) -> list[EarlyWarning]:
    """Return a warning if the loss stands still while the learning rate is high.

    Noise or a rise is no standstill: I-JEPA's loss on digits rises by a fifth as features improve.
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
    advice = "more epochs at this optimizer.lr gain nothing: try another rate, or fewer epochs"
    return [EarlyWarning("loss", curve.epoch, abs(gained), limits.plateau_change, seen, advice)]


def early_warnings(probes: Probes, curve: LossCurve | None, values: Mapping[str, Any]) -> list[EarlyWarning]:
    """Return all warnings of a run; `values` is its configuration, `curve` may be missing."""
    given = values["warnings"]
    limits = WarningConfig(**{f.name: given[f.name] for f in fields(WarningConfig) if f.name in given})
    found = of_features(probes, limits, values["probes"]["collapsed_std"]) + of_knn(probes, limits)
    optimizer = values["optimizer"]
    return found + (of_loss(curve, limits, optimizer["lr"], optimizer["warmup_epochs"]) if curve is not None else [])
