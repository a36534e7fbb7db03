"""Draw the figures of a search from the run folders: Optuna's own, and slices.

All but the Pareto front are of the first objective alone, from a study that has only that one. Of a
study with two, Optuna cannot tell the direction of a target that it is given: it draws no best so
far, reverses the colours, and its importances say what makes small values.
"""

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import optuna
import plotly.graph_objects as go
from optuna import visualization
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial
from plotly.colors import sample_colorscale

from sweeps.report.html_figures import PALETTE, layout
from sweeps.report.optuna_study import study_of
from sweeps.search.sampler import COMPLETE
from sweeps.state.view import View

# A page shows only the few dimensions that matter most.
_SLICES_OF, _CONTOURS_OF = 4, 3
_FEWEST = 20  # completed runs for importances, which are of the best tenth: of fewer they name the wrong parameter
IMPORTANCES = "Parameter importances"
_LATER = ["#7d97c4", "#0d2a5c"]
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
        found.append((IMPORTANCES, drawn, 90 + 34 * len(params)))
    else:
        params = varied
    found += [(f"Slice: {_last(p)}", slice_of(done, p, objective), 340) for p in params[:_SLICES_OF]]
    if len(params) > 1:
        some, of_all = sample(done, study, _RUNS_OF_CONTOURS)
        shown = [p for p in params if len({t.params.get(p) for t in some.get_trials(deepcopy=False)} - {None}) > 1][:_CONTOURS_OF]
        # Two parameters a figure: a matrix of them has no room on a phone.
        options = {p for p in shown if all(isinstance(t.distributions[p], CategoricalDistribution) for t in done if p in t.params)}
        # Of two parameters that are options alone there is no slope to draw.
        for pair in [two for two in itertools.combinations(shown, 2) if not options.issuperset(two)]:
            drawn = visualization.plot_contour(some, params=list(pair), target_name=objective)
            found.append((f"Contours: {' and '.join(map(_last, pair))}{of_all}", drawn, 380))
    if len(whole.directions) > 1 and done:
        names = [objective, "device-hours"]
        found.append(("Accuracy against device-hours", visualization.plot_pareto_front(whole, target_names=names), 420))
    return [(heading, _for_page(heading, layout(_last_parts(figure, objective), height))) for heading, figure, height in found]


def slice_of(done: Sequence[FrozenTrial], param: str, objective: str) -> go.Figure:
    """Plot the scores of completed runs over one parameter, later runs darker.

    Optuna's own slices share one figure, which has no room on a phone, and write texts in quotes.
    """
    runs = [t for t in done if param in t.params and t.value is not None]
    kind = runs[0].distributions[param]
    of_options = isinstance(kind, CategoricalDistribution)
    # Options that are not all numbers have no axis of numbers.
    words = of_options and not all(isinstance(o, (int, float)) and not isinstance(o, bool) for o in kind.choices)  # type: ignore[attr-defined]
    values = [str(t.params[param]) if words else t.params[param] for t in runs]
    shares = [i / max(len(runs) - 1, 1) for i in range(len(runs))]
    figure = go.Figure()
    figure.add_scatter(
        x=values,
        y=[t.value for t in runs],
        mode="markers",
        marker={"color": sample_colorscale(_LATER, shares), "size": 8, "opacity": 0.85},
        hovertemplate=[f"#{t.number}<br>{_last(param)} {value}: %{{y:.4g}}<extra></extra>" for t, value in zip(runs, values, strict=True)],
    )
    if words:
        figure.update_xaxes(type="category")
    elif getattr(kind, "log", False):
        figure.update_xaxes(type="log")
    figure.update_xaxes(title=param)
    figure.update_yaxes(title=objective)
    return figure.update_layout(showlegend=False, meta="darker: later runs")


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _for_page(heading: str, figure: go.Figure) -> go.Figure:
    """Arrange a figure for a page that may be as narrow as a phone."""
    if heading == IMPORTANCES:
        figure.update_traces(cliponaxis=False, marker_color=PALETTE[0])
        figure.update_xaxes(title=None, range=[0, 1.25 * max(figure.data[0].x)])  # room for the number after the longest bar
        figure.update_yaxes(title=None)
    if heading.startswith("Contours"):
        figure.update_traces(colorbar={"thickness": 10, "title": None}, selector={"type": "contour"})
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
    if len(done) < _FEWEST or not common or len({t.values[0] for t in done}) == 1:
        return {}
    found = optuna.importance.get_param_importances(study, evaluator=_evaluator(), params=common)
    # Equal ones are what Optuna gives if it has found nothing.
    return found if len(found) == 1 or max(found.values()) - min(found.values()) > 1e-9 else {}
