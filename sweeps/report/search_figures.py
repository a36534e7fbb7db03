"""Draw Optuna's own figures of a search from the run folders.

All but the Pareto front are of the first objective alone, from a study that has only that one. Of a
study with two, Optuna cannot tell the direction of a target that it is given: it draws no best so
far, reverses the colours, and its importances say what makes small values.
"""

import copy
from collections.abc import Sequence
from typing import Any

import optuna
import plotly.graph_objects as go
from optuna import visualization
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

from sweeps.report.html_figures import layout
from sweeps.report.optuna_study import study_of
from sweeps.search.sampler import COMPLETE
from sweeps.state.view import View

# A page shows only the few dimensions that matter most.
_SLICES_OF, _CONTOURS_OF = 4, 3
_WIDE = ("Slices", "Contours", "Accuracy against")
# Runs of a figure whose size grows with their square, and of one with a curve for each.
_RUNS_OF_CONTOURS, _RUNS_OF_CURVES = 80, 100


def search_figures(view: View) -> list[tuple[str, go.Figure]]:
    """Return headings and figures of a search, [] for other sweeps.

    Figures that need more completed runs are left out. A heading says if not all runs are drawn.
    """
    if view.sweep.search is None:
        return []
    whole, objective = study_of(view), view.sweep.objective
    study = of_first_objective(whole)
    trials = study.get_trials(deepcopy=False)
    done = [t for t in trials if t.state is COMPLETE]
    varied = [p for p in sorted({p for t in done for p in t.params}) if len({t.params[p] for t in done if p in t.params}) > 1]
    found = [("Optimization history", visualization.plot_optimization_history(study, target_name=objective), 380)] if done else []
    if any(t.intermediate_values for t in trials):
        some, of_all = sample([t for t in trials if t.intermediate_values], study, _RUNS_OF_CURVES)
        found.append((f"Probes during training, including pruned runs{of_all}", visualization.plot_intermediate_values(some), 380))
    weights = importances(study, varied)
    if weights:
        params = list(weights)
        drawn = visualization.plot_param_importances(study, _evaluator(), params, target_name=objective)
        found.append(("Parameter importances", drawn, 90 + 34 * len(params)))
    else:
        params = varied
    if params:
        found.append(("Slices", visualization.plot_slice(study, params=params[:_SLICES_OF], target_name=objective), 380))
    if len(params) > 1:
        some, of_all = sample(done, study, _RUNS_OF_CONTOURS)
        shown = [p for p in params if len({t.params.get(p) for t in some.get_trials(deepcopy=False)} - {None}) > 1][:_CONTOURS_OF]
        if len(shown) > 1:
            found.append((f"Contours{of_all}", visualization.plot_contour(some, params=shown, target_name=objective), 620))
    if len(whole.directions) > 1 and done:
        names = [objective, "device-hours"]
        found.append(("Accuracy against device-hours", visualization.plot_pareto_front(whole, target_names=names), 420))
    return [(heading, _for_page(heading, layout(_last_parts(figure, objective), height))) for heading, figure, height in found]


def _for_page(heading: str, figure: go.Figure) -> go.Figure:
    """Arrange a figure for a page that may be as narrow as a phone."""
    if heading.startswith(_WIDE):
        figure.update_layout(meta="wide")  # it is scrolled there: its axes and bars have no room beside each other
    if heading == "Parameter importances":
        figure.update_traces(cliponaxis=False)
        figure.update_xaxes(title=None, range=[0, 1.2 * max(figure.data[0].x)])  # room for the number after the longest bar
        figure.update_yaxes(title=None)
    return figure.update_layout(legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0})


def of_first_objective(study: optuna.Study) -> optuna.Study:
    """Return a study of the first objective of `study` alone, in its direction, with parameters that can be drawn."""
    return _of_trials([_with_first_value(t) for t in _drawable(study.get_trials(deepcopy=False))], study.directions[0])


def _of_trials(trials: Sequence[FrozenTrial], direction: StudyDirection) -> optuna.Study:
    made = optuna.create_study(direction=direction)
    made.add_trials(trials)
    return made


def _with_first_value(trial: FrozenTrial) -> FrozenTrial:
    made = copy.copy(trial)
    if trial.values is not None:
        made.values = trial.values[:1]
    return made


def _drawable(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return `trials` with texts for the options of a parameter unless all are texts, or all numbers.

    Optuna puts options in order to draw an axis, which mixed ones have not, and takes True for 1.
    """
    mixed = {key: made for t in trials for key, kind in t.distributions.items() if (made := _as_texts(kind)) is not None}
    found = []
    for trial in trials:
        changed = copy.copy(trial)
        changed.distributions = {key: mixed.get(key, kind) for key, kind in trial.distributions.items()}
        changed.params = {key: str(value) if key in mixed else value for key, value in trial.params.items()}
        found.append(changed)
    return found


def _as_texts(kind: BaseDistribution) -> CategoricalDistribution | None:
    """Return a distribution over the texts of the options, or None if they can be drawn as they are."""
    if not isinstance(kind, CategoricalDistribution):
        return None
    numbers = [isinstance(option, (int, float)) and not isinstance(option, bool) for option in kind.choices]
    if all(numbers) or all(isinstance(option, str) for option in kind.choices):
        return None
    return CategoricalDistribution(list(dict.fromkeys(map(str, kind.choices))))


def sample(trials: Sequence[FrozenTrial], study: optuna.Study, most: int) -> tuple[optuna.Study, str]:
    """Return a study of at most `most` of `trials`, from the best to the worst, and words that say so.

    Those without a value, as pruned ones, come after the others.
    """
    sign = -1.0 if study.direction is StudyDirection.MAXIMIZE else 1.0
    ranked = sorted(trials, key=lambda t: (t.state is not COMPLETE, sign * t.value if t.state is COMPLETE and t.value is not None else 0.0))
    if len(ranked) <= most:
        return _of_trials(sorted(ranked, key=lambda t: t.number), study.direction), ""
    kept = {round(i * (len(ranked) - 1) / (most - 1)) for i in range(most)}
    some = sorted((ranked[i] for i in kept), key=lambda t: t.number)
    return _of_trials(some, study.direction), f", of {most} of {len(ranked):,} runs, from the best to the worst"


def _last_parts(figure: go.Figure, objective: str) -> go.Figure:
    """Shorten axis titles to the last part of a key; whole keys of adjacent axes would overlap."""

    def shorten(axis: Any) -> None:
        if axis.title.text and axis.title.text != objective:
            axis.title.text = axis.title.text.rpartition(".")[2]

    figure.for_each_xaxis(shorten)
    figure.for_each_yaxis(shorten)
    return figure


def _evaluator() -> PedAnovaImportanceEvaluator:
    """Return the default of Optuna 5: the one of earlier versions draws at random, and differs from page to page."""
    return PedAnovaImportanceEvaluator()


def importances(study: optuna.Study, params: Sequence[str]) -> dict[str, float]:
    """Return the importance of each parameter that every completed run has, largest first.

    Return {} if there are too few runs to say anything.
    """
    done = [t for t in study.get_trials(deepcopy=False) if t.state is COMPLETE]
    common = [p for p in params if all(p in t.params for t in done)]
    if len(done) < 4 or not common or len({t.values[0] for t in done}) == 1:
        return {}
    return optuna.importance.get_param_importances(study, evaluator=_evaluator(), params=common)
