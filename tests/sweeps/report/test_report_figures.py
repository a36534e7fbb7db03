"""The figures of the page: axes, colours, error bars, curves and the Pareto front."""

import dataclasses
import re
from pathlib import Path

import plotly.graph_objects as go
import pytest
from plotly.colors import hex_to_rgb, sample_colorscale

from sweeps.report import html
from sweeps.report.aggregate import Spread, Summary, summaries
from sweeps.report.best import score_of_best
from sweeps.report.html_curves import curves, points_of_a_curve, thinned
from sweeps.report.html_figures import PALETTE, SCALE, colours, costs_figure, numeric_axis, pareto, scores_figure
from sweeps.report.html_lines import add_lines
from sweeps.report.html_names import placed
from sweeps.report.seen import Seen
from sweeps.report.status import best_line
from sweeps.report.tables import peoples_table
from sweeps.spec.space import applied
from sweeps.spec.sweep import Configuration
from sweeps.state.view import View
from tests.support.reported import ALIKE, CLEAR, LINEAR, OBJECTIVE, made


def test_an_axis_is_logarithmic_where_its_numbers_span_more_than_thirtyfold_and_a_line_goes_by_them(tmp_path: Path) -> None:
    for name, rates, kind in (("wide", (0.31, 0.01, 0.1), "log"), ("narrow", (0.3, 0.01, 0.1), None)):
        configurations = [Configuration({"optimizer.lr": rate}) for rate in rates]
        view = made(tmp_path / name, {f"lr {rate:g}": [100 * rate] for rate in rates}, configurations, seeds=1)
        table = summaries(view)
        figure = scores_figure(view, table, OBJECTIVE, colours(table))
        assert figure.layout.xaxis.type == kind
        assert list(figure.data[0].x) == sorted(rates)
        assert list(figure.data[0].y) == [100 * rate for rate in sorted(rates)]


def test_many_configurations_have_colours_from_best_to_worst() -> None:
    table = [Summary(f"s{i}", {OBJECTIVE: Spread.of([float(i)])}, 0, 0, 0, 0, 0.0, {}, {}, {}) for i in range(40)]
    found = colours(table[::-1])  # the best first, as a summary has it
    assert found["s39"] == "rgb(27, 42, 122)"  # where the scale begins
    assert found["s0"] == "rgb(140, 18, 48)"


def test_every_colour_has_the_contrast_that_wcag_asks_of_graphics() -> None:
    def contrast(red: float, green: float, blue: float) -> float:
        parts = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (red / 255, green / 255, blue / 255)]
        return 1.05 / (0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2] + 0.05)

    assert min(contrast(*hex_to_rgb(colour)) for colour in PALETTE) >= 4.5
    between = [tuple(map(float, re.findall(r"[\d.]+", colour))) for colour in sample_colorscale(SCALE, [i / 60 for i in range(61)])]
    assert min(contrast(*colour) for colour in between) >= 4.5


def test_error_bars_of_a_costs_figure_are_each_of_their_own_axis(tmp_path: Path) -> None:
    table = [Summary("a", {OBJECTIVE: Spread(50.0, 2.0, 3)}, 0, 0, 0, 0, 0.0, {}, {}, {})]
    (point, _) = costs_figure(made(tmp_path, ALIKE), table, {"a": Spread(3.0, 0.5, 3)}, "GPU-hours", {"a": "#000"}).data
    assert (point.x[0], point.error_x.array[0], point.y[0], point.error_y.array[0]) == (3.0, 0.5, 50.0, 2.0)


def test_no_name_on_the_front_of_costs_covers_another() -> None:
    names = {"a": "configuration a", "b": "configuration b", "far": "far"}
    points = {"a": (1.0, 70.0), "b": (1.0, 70.01), "far": (3.0, 50.0)}
    found = placed(points, names, (0.0, 4.0, 40.0, 80.0), list(points.values()))
    assert [one["text"] for one in found] == ["configuration b", "far"] or found[0]["text"] == "configuration a"
    corners = [(one["xanchor"], one["yanchor"]) for one in found if one["x"] == 1.0]
    assert len(set(corners)) == len(corners)
    crowd = {str(i): (1.0, 70.0 + i / 100) for i in range(9)}
    assert len(placed(crowd, dict.fromkeys(crowd, "a long name"), (0.0, 4.0, 40.0, 80.0), list(crowd.values()))) < 5


def with_references(view: View, **references: float) -> View:
    for trial in view.sweep.trials:
        run = view.sweep.run(trial)
        done = run.result()
        assert done is not None
        (run.path / "result.json").unlink()
        found = {name.replace("_", " "): dict.fromkeys(done.metrics, value) for name, value in references.items()}
        run.write_result(dataclasses.replace(done, references=found))
    return View(view.sweep)


def test_chance_level_and_the_baseline_are_lines_and_the_score_of_the_best_is_the_one_of_the_sentence(tmp_path: Path) -> None:
    view = with_references(made(tmp_path, CLEAR), chance_level=35.0)
    seen = Seen(view)
    figure = add_lines(scores_figure(view, seen.table, OBJECTIVE, colours(seen.table)), seen, seen.table, OBJECTIVE)
    assert {shape.name: (shape.x0, shape.x1) for shape in figure.layout.shapes} == {
        "chance level": (35.0, 35.0),
        "first configuration, depth 1": (60.5, 60.5),
    }
    assert seen.lead is not None
    best = figure.data[-1]
    assert (best.x[0], best.y[0]) == (seen.lead.winner.estimate, "depth 2")
    assert best.x[0] + best.error_x.array[0] == pytest.approx(seen.lead.winner.high)
    assert best.x[0] - best.error_x.arrayminus[0] == pytest.approx(seen.lead.winner.low)
    said = score_of_best(view, seen.lead)
    assert said in best.hovertemplate
    assert said in best_line(view)
    assert said in " ".join(peoples_table(view).notes)
    assert f"score of the best: {said}" in html.build(view)
    test = add_lines(scores_figure(view, seen.table, LINEAR, colours(seen.table)), seen, seen.table, LINEAR)
    assert len(test.data) == 3  # the best is judged by the objective


def test_a_line_far_from_all_scores_is_said_instead(tmp_path: Path) -> None:
    view = with_references(made(tmp_path, ALIKE | {"pointwise": [70.0, 71.0, 70.5]}), chance_level=10.0)
    seen = Seen(view)
    figure = add_lines(scores_figure(view, seen.table, OBJECTIVE, colours(seen.table)), seen, seen.table, OBJECTIVE)
    assert [shape.name for shape in figure.layout.shapes] == ["first configuration, depth 1"]
    assert figure.layout.meta == "outside the axis: chance level at 10.0 %"


def test_lines_lie_across_an_axis_of_numbers(tmp_path: Path) -> None:
    configurations = [Configuration({"method.predictor.depth": d}) for d in (1, 2, 3)]
    view = made(tmp_path, {f"depth {d}": [60.0 + d, 62.0 + d, 61.0 + d] for d in (1, 2, 3)}, configurations)
    seen = Seen(view)
    figure = add_lines(scores_figure(view, seen.table, OBJECTIVE, colours(seen.table)), seen, seen.table, OBJECTIVE)
    assert [(shape.y0, shape.xref) for shape in figure.layout.shapes] == [(62.0, "paper")]
    assert seen.lead is not None
    assert (figure.data[-1].x[0], figure.data[-1].y[0]) == (3.0, seen.lead.winner.estimate)


def test_a_curve_is_thinned_to_means_and_keeps_its_last_point() -> None:
    found = thinned([float(i) for i in range(1001)], [float(i % 2) for i in range(1001)], 101)
    assert len(found.values) == 101
    assert found.values[0] == 0.5
    assert (found.epochs[-1], found.values[-1]) == (1000.0, 0.0)
    assert thinned([1.0], [2.0], 16).values == [2.0]
    assert points_of_a_curve(10) == 240
    assert points_of_a_curve(10_000) == 16
    reported = curves([{"kind": "step", "step": 1, "epoch": 0.5, "loss": None}, {"kind": "probe", "step": 2, "epoch": 1.0, "loss": 3}], 16)
    assert list(reported) == ["loss"]
    assert (reported["loss"].epochs, reported["loss"].values) == ([1.0], [3.0])


def test_the_pareto_front_holds_what_no_other_beats_in_both() -> None:
    points = {"cheap": (1.0, 50.0), "dear": (4.0, 80.0), "beaten": (4.5, 79.0), "middle": (2.0, 70.0), "same cost": (2.0, 60.0)}
    assert pareto(points) == ["cheap", "middle", "dear"]
    assert pareto({"a": (1.0, 50.0), "as good, dearer": (2.0, 50.0)}) == ["a"]
    assert pareto({"worse": (1.0, 40.0), "same cost": (1.0, 50.0)}) == ["same cost"]


def test_configurations_that_differ_in_one_number_are_a_line_with_the_papers_points(tmp_path: Path) -> None:
    configurations = [Configuration({"method.predictor.depth": d}, {LINEAR: 60.0 + d}) for d in (3, 1, 2)]
    view = made(tmp_path, {f"depth {d}": [60.0 + d, 62.0 + d, 61.0 + d] for d in (1, 2, 3)}, configurations)
    table = summaries(view)
    line, seeds, paper = scores_figure(view, table, LINEAR, colours(table)).data
    assert (list(line.x), list(line.y)) == ([1, 2, 3], [61.0, 62.0, 63.0])
    assert list(line.error_y.array) == [1.0, 1.0, 1.0]
    assert len(seeds.x) == 9
    assert dict(zip(paper.x, paper.y, strict=True)) == {1: 61.0, 2: 62.0, 3: 63.0}


@pytest.mark.parametrize(
    ("third", "axis"),
    [
        ({}, "method.predictor.depth"),
        ({"method.mask.mask_ratio": 0.7}, None),
        ({"method.only_this_one": 1}, None),  # as a method's own keys
        ({"method.predictor.depth": True}, None),
        ({"method.predictor.depth": None}, None),
        ({"method.predictor": None}, None),
    ],
    ids=str,
)
def test_only_one_key_that_all_have_and_that_is_a_number_makes_a_line(third: dict[str, object], axis: str | None, tmp_path: Path) -> None:
    view = made(tmp_path, {}, [Configuration({"method.predictor.depth": d}) for d in (1, 2, 3)], seeds=1)
    trials = view.sweep.trials
    for order in (trials, trials[::-1]):  # whichever configuration comes first
        changed = [dataclasses.replace(t, values=applied(t.values, third, 42)) if t is trials[2] else t for t in order]
        assert numeric_axis(View(dataclasses.replace(view.sweep, trials=changed))) == axis


def test_other_configurations_are_marks_with_error_bars_seeds_and_the_papers_values(tmp_path: Path) -> None:
    table = summaries(view := made(tmp_path, CLEAR))
    figure: go.Figure = scores_figure(view, table, LINEAR, colours(table))
    dots, squares, diamonds = figure.data  # of all configurations together: a browser draws hundreds of traces slowly
    hues = colours(table)
    assert (squares.marker.symbol, diamonds.marker.symbol) == ("square", "diamond-open")
    assert list(squares.x) == [s.spreads[LINEAR].mean for s in table]
    assert list(squares.marker.color) == [hues[s.key] for s in table]
    assert sorted(dots.x) == sorted(value for s in table for value in s.values[LINEAR].values())
    assert all(x == table[squares.y.index(y)].values[LINEAR][42 + i % 3] for i, (x, y) in enumerate(zip(dots.x, dots.y, strict=True)))
    assert len(diamonds.x) == 2
    assert squares.error_x.array[0] == pytest.approx(0.4163, rel=1e-3)
    many = [dataclasses.replace(table[0], configuration=str(i)) for i in range(40)]
    assert len(set(colours(many).values())) == 40
