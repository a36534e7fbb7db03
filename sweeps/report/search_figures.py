"""Draw Optuna's own figures of a search from the run folders."""

from collections.abc import Callable
from typing import Any

import optuna
import plotly.graph_objects as go
from optuna import visualization

from sweeps.report.html_figures import layout
from sweeps.report.optuna_study import study_of
from sweeps.search.sampler import COMPLETE
from sweeps.state.view import View

# A page shows only the few dimensions that matter most.
_SLICES_OF, _CONTOURS_OF = 4, 3


def search_figures(view: View) -> list[tuple[str, go.Figure]]:
    """Return headings and figures of a search, [] for other sweeps.

    Figures that need more completed runs are left out.
    """
    if view.sweep.search is None:
        return []
    study = study_of(view)
    trials = study.get_trials(deepcopy=False)
    done = [t for t in trials if t.state is COMPLETE]
    varied = [p for p in sorted({p for t in done for p in t.params}) if len({t.params[p] for t in done if p in t.params}) > 1]
    costs = view.sweep.search.costs
    names = [view.sweep.objective, "device-hours"]
    target: Callable[[optuna.trial.FrozenTrial], float] | None = (lambda trial: float(trial.values[0])) if costs else None
    shown: dict[str, Any] = {"target": target, "target_name": names[0]}
    found = [("Optimization history", visualization.plot_optimization_history(study, **shown), 380)] if done else []
    if any(t.intermediate_values for t in trials) and not costs:
        found.append(("Probes during training, including pruned runs", visualization.plot_intermediate_values(study), 380))
    weights = importances(study, varied, target)
    if weights:
        params = list(weights)
        found.append(("Parameter importances", visualization.plot_param_importances(study, params=params, **shown), 90 + 34 * len(params)))
    else:
        params = varied
    if params:
        found.append(("Slices", visualization.plot_slice(study, params=params[:_SLICES_OF], **shown), 380))
    if len(params) > 1:
        found.append(("Contours", visualization.plot_contour(study, params=params[:_CONTOURS_OF], **shown), 620))
    if costs and done:
        found.append(("Accuracy against device-hours", visualization.plot_pareto_front(study, target_names=names), 420))
    return [(heading, layout(_last_parts(figure, view.sweep.objective), height)) for heading, figure, height in found]


def _last_parts(figure: go.Figure, objective: str) -> go.Figure:
    """Shorten axis titles to the last part of a key; whole keys of adjacent axes would overlap."""

    def shorten(axis: Any) -> None:
        if axis.title.text and axis.title.text != objective:
            axis.title.text = axis.title.text.rpartition(".")[2]

    figure.for_each_xaxis(shorten)
    figure.for_each_yaxis(shorten)
    return figure


def importances(study: optuna.Study, params: list[str], target: Callable[[optuna.trial.FrozenTrial], float] | None) -> dict[str, float]:
    """Return the importance of each parameter that every completed run has, largest first.

    Return {} if there are too few runs to say anything.
    """
    done = [t for t in study.get_trials(deepcopy=False) if t.state is COMPLETE]
    common = [p for p in params if all(p in t.params for t in done)]
    if len(done) < 4 or not common or len({t.values[0] for t in done}) == 1:
        return {}
    return optuna.importance.get_param_importances(study, params=common, target=target)
