import csv
import dataclasses
import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cnnjepa.run.folder import RunResult, RunStatus
from sweeps.execution.monitor import wide_console
from sweeps.report import html, plots, tables
from sweeps.report.aggregate import FineSpread, Spread, Summary, judged, leader, leaders_of, summaries
from sweeps.report.significance import compare
from sweeps.report.status import counts_line, sweep_status
from sweeps.spec.sweep import ScaleName, build_trials
from sweeps.state import claims
from sweeps.state.folder import Sweep
from sweeps.state.view import View
from tests.support.tiny_sweep import sweep

OBJECTIVE, LINEAR, KNN = "linear.holdout_top1", "linear.test_top1", "knn.test_top1"


@pytest.fixture
def view(tmp_path: Path) -> View:
    """Three configurations, two seeds: all of 'depth 1'; one of 'depth 2' and a failure; one of 'pointwise' without k-NN, one not begun."""
    spec = sweep()
    trials = build_trials(spec, spec.paper, 2, "local", [])
    made = Sweep.of(spec, ScaleName.paper, trials, tmp_path)
    made.write()
    numbers = {
        ("depth 1", 42): {OBJECTIVE: 60.0, LINEAR: 61.0, KNN: 50.0},
        ("depth 1", 43): {OBJECTIVE: 62.0, LINEAR: 65.0, KNN: 51.0},
        ("depth 2", 42): {OBJECTIVE: 70.0, LINEAR: 71.0, KNN: 52.0},
        ("pointwise", 42): {OBJECTIVE: 40.0, LINEAR: 41.0},
    }
    for trial in trials:
        folder = made.run(trial)
        metrics = numbers.get((trial.label, trial.seed))
        if metrics:
            missing = {} if KNN in metrics else {"knn": "ValueError: features are not finite"}
            result = RunResult(RunStatus.completed, metrics=metrics, missing=missing, parameters=1234, device_hours=0.5)
        elif trial.label == "depth 2":
            result = RunResult(RunStatus.failed, "NonFiniteError: loss nan", device_hours=0.25)
        else:
            continue
        folder.prepare(trial.config)
        folder.write_result(result)
    return View(made)


def table(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_summary_has_mean_std_and_n_best_first_and_counts_what_is_left_out(view: View) -> None:
    lines = table(tables.summary_csv(view))
    assert [line["setting"] for line in lines] == ["depth 2", "depth 1", "pointwise"]
    two, one, pointwise = lines
    assert float(one[f"{LINEAR}_mean"]) == 63
    assert float(one[f"{LINEAR}_std"]) == pytest.approx(8**0.5)
    assert one[f"{LINEAR}_n"] == "2"
    assert (two[f"{LINEAR}_mean"], two[f"{LINEAR}_std"], two[f"{LINEAR}_n"], two["failed"]) == ("71.0", "", "1", "1")
    assert (pointwise[f"{KNN}_mean"], pointwise[f"{KNN}_n"], pointwise["unfinished"]) == ("", "0", "1")
    assert float(two["device_hours"]) == 0.75  # what a failed run cost is not forgotten
    assert one[f"{LINEAR}_paper"] == "64.86"
    assert pointwise[f"{LINEAR}_paper"] == ""


def test_results_have_one_line_a_run_and_a_missing_value_is_empty_with_its_cause(view: View) -> None:
    lines = table(tables.results_csv(view))
    assert len(lines) == 6
    by = {(line["setting"], line["seed"]): line for line in lines}
    assert by["depth 2", "43"]["state"] == "failed"
    assert by["depth 2", "43"][LINEAR] == ""
    assert by["depth 2", "43"]["cause"] == "NonFiniteError: loss nan"
    assert by["pointwise", "42"][KNN] == ""
    assert by["pointwise", "42"]["cause"] == "knn: ValueError: features are not finite"
    assert by["pointwise", "43"]["state"] == "waiting"


def test_the_terminal_table_shows_the_papers_value_beside_ours(view: View) -> None:
    console = Console(record=True, width=160, file=io.StringIO())
    console.print(tables.terminal_table(view))
    text = console.export_text()
    assert text.index("depth 2") < text.index("depth 1") < text.index("pointwise")
    assert "63.0 ± 2.8" in text
    assert "paper: linear top-1, test" in text
    assert "73.22" in text
    assert "63.0 ± 2.8 (2)" in text
    assert "1 failed" in text
    assert "1 pending" in text


def test_every_format_says_which_runs_its_numbers_are_of(view: View) -> None:
    said = "run set: all 4 completed runs, of 3 configurations and seeds 42, 43; left out: 1 failed, 1 not ended"
    assert said + "; probes without a value: k-NN top-1, test of 1" in tables.markdown_table(view)
    assert said in tables.latex_table(view)
    console = Console(record=True, width=400, file=io.StringIO())
    console.print(tables.terminal_table(view))
    assert said in console.export_text()


def test_a_table_says_on_how_many_images_its_scores_rest(view: View) -> None:
    assert "images behind a score" not in tables.markdown_table(view), "runs of 0.1 do not say"
    for trial in view.sweep.trials:
        result = view.result(trial)
        if result is not None and result.metrics:
            test = 5000 if trial.seed == 42 else 4000
            images = {metric: 287 if metric == OBJECTIVE else test for metric in result.metrics}
            view.sweep.run(trial).write_result(dataclasses.replace(result, images=images, claim=1))
    found = View(view.sweep)
    # Of the best: sqrt(70 x 30 / 287), sqrt(71 x 29 / 4000), sqrt(52 x 48 / 4000).
    said = "linear top-1, held-out 287 (± 2.7), linear top-1, test 4,000 to 5,000 (± 0.7), k-NN top-1, test 4,000 to 5,000 (± 0.8)"
    for text in (tables.markdown_table(found), tables.latex_table(found).replace(r"$\pm$", "±")):
        lead = "images behind a score, and the standard error that their choice gives the best, which no test over seeds covers"
        assert f"{lead}: {said}" in text


def test_a_table_ends_with_chance_level_and_the_random_encoders(view: View) -> None:
    for trial in view.sweep.trials:
        result = view.result(trial)
        if result is not None and result.metrics:
            # 'pointwise' has another encoder of the same name.
            random = 30.0 + trial.seed - 42 + 5 * (trial.label == "pointwise")
            compared = {"random resnet18": {LINEAR: random, OBJECTIVE: 20.0}, "chance level": dict.fromkeys(result.metrics, 10.0)}
            view.sweep.run(trial).write_result(dataclasses.replace(result, references=compared, claim=1))
    found = View(view.sweep)
    *_, one, other, chance = [line for line in tables.markdown_table(found).splitlines() if line.startswith("|")]
    assert one.startswith("| random resnet18 (depth 1) | 20.0 | 30.5 ± 0.7 (2) | - | ")
    assert other.startswith("| random resnet18 (pointwise) | 20.0 | 35.0 | - | ")
    assert chance.startswith("| chance level | 10.0 | 10.0 | 10.0 | ")
    assert {line.count("|") for line in (one, other, chance)} == {tables.markdown_table(found).splitlines()[0].count("|")}
    last = table(tables.summary_csv(found))[-1]
    assert (last["setting"], last[f"{KNN}_mean"], last["parameters"]) == ("chance level", "10.0", "")
    assert "chance level" in tables.latex_table(found)
    page = html.build(found)
    assert "random resnet18 (pointwise)" in page
    assert "35.0" in page


def test_a_best_that_is_tied_is_marked_and_never_bold(view: View) -> None:
    markdown = tables.markdown_table(view)
    assert "**" not in markdown
    assert "| depth 2 | 70.0 (1) † | 71.0 (1) † | 52.0 (1) † |" in markdown
    assert "70.0 (1) †" in markdown
    assert "| 52.0 (1) † |" in markdown  # of its column, with one seed
    assert "no test, which needs two runs of the best, and runs that differ" in markdown
    assert r"\textbf" not in tables.latex_table(view)


@pytest.fixture
def apart(tmp_path: Path) -> View:
    """Three seeds of three configurations: in the linear probe depth 2 is far above the others, in k-NN all are alike."""
    spec = sweep()
    made = Sweep.of(spec, ScaleName.smoke, build_trials(spec, spec.smoke, 3, "local", []), tmp_path / "apart")
    made.write()
    for i, trial in enumerate(made.trials):
        linear = {"depth 1": 60.0, "depth 2": 75.0, "pointwise": 61.0}[trial.label] + (i * 7 % 5) / 4
        metrics = {OBJECTIVE: linear, LINEAR: linear - 1, KNN: 50.0 + (i * 5 % 7)}
        made.run(trial).prepare(trial.config)
        made.run(trial).write_result(RunResult(RunStatus.completed, metrics=metrics, parameters=1234, device_hours=0.5))
    return View(made)


def test_the_best_is_bold_where_it_is_significant_and_only_there(apart: View) -> None:
    lines = tables.markdown_table(apart).splitlines()
    best = next(line for line in lines if line.startswith("| depth 2 "))
    assert best.count("**") == 4  # the objective and the linear probe
    assert sum(line.count("**") for line in lines) == 4
    assert sum(line.count(" †") for line in lines if line.startswith("| ")) == 1
    assert any(
        "linear top-1, test: depth 2 against" in line and "paired t over 3 seeds); among all 3 configurations p" in line for line in lines
    )
    console = Console(width=250, force_terminal=True, color_system="standard", file=io.StringIO())
    console.print(tables.terminal_table(apart))
    assert re.search(r"\x1b\[1m +7[56]\.\d ± ", console.file.getvalue())


def test_a_column_after_one_without_a_best_has_none(apart: View) -> None:
    """The objective is first: without a best by it, the linear probe's is not bold however clear it is."""
    for i, trial in enumerate(apart.sweep.trials):
        result = apart.result(trial)
        assert result is not None
        metrics = {**result.metrics, OBJECTIVE: 50.0 + (i * 5 % 7)}
        apart.sweep.run(trial).write_result(dataclasses.replace(result, metrics=metrics, claim=1))
    found = leaders_of(View(apart.sweep), summaries(View(apart.sweep)))
    assert {metric: lead is not None and lead.significant for metric, lead in found.items()} == dict.fromkeys(
        [OBJECTIVE, LINEAR, KNN], False
    )
    assert "**" not in tables.markdown_table(View(apart.sweep))


def test_the_csv_says_what_is_judged_of_each_configuration(apart: View) -> None:
    lines = {line["setting"]: line for line in table(tables.summary_csv(apart))}
    judged_as = {name: (line["best"], line["may_be_best"]) for name, line in lines.items()}
    assert judged_as == {"depth 2": ("1", "1"), "depth 1": ("0", "0"), "pointwise": ("0", "0")}
    assert float(lines["depth 1"]["p_against_best"]) < 0.01
    best = lines["depth 2"]
    assert best["p_against_best"] == lines["depth 1"]["estimate"] == ""
    assert float(best["estimate"]) == pytest.approx(75.5, abs=0.8)
    assert float(best["estimate_low"]) < float(best["estimate"]) < float(best["estimate_high"])


def test_the_latex_table_is_whole(apart: View) -> None:
    text = tables.latex_table(apart)
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    columns = text.split(r"\begin{tabular}{")[1].split("}")[0]
    assert len(body) == 4
    assert {line.replace(r"\&", "").count("&") for line in body} == {len(columns) - 1}
    assert text.count(r"\textbf{") == 2
    assert r"$\pm$" in text
    assert "±" not in text
    assert "†" not in text
    assert text.count("{") == text.count("}")
    assert tables.tex("-9.7 to 10.4, top-1, held-out") == "$-$9.7 to 10.4, top-1, held-out"
    assert tables.tex("50% of a_b & {c} < ~^\\") == r"50\% of a\_b \& \{c\} $<$ \textasciitilde{}\textasciicircum{}\textbackslash{}"


def test_the_picture_is_drawn_also_with_gaps_and_with_nothing(view: View, tmp_path: Path) -> None:
    for path in tables.write_all(view):
        assert path.stat().st_size > 100
    assert (tmp_path / "ablation.png").read_bytes().startswith(b"\x89PNG")
    spec = sweep()
    empty = Sweep.of(spec, ScaleName.smoke, build_trials(spec, spec.smoke, 1, "local", []), tmp_path / "empty")
    empty.write()
    tables.write_all(View(empty))


def test_views_are_the_same_bytes_when_rebuilt(view: View, tmp_path: Path) -> None:
    first = [p.read_bytes() for p in tables.write_all(view)]
    assert [p.read_bytes() for p in tables.write_all(View(Sweep.load(tmp_path)))] == first


def test_status_counts_by_state(view: View) -> None:
    status = sweep_status(view)
    assert status["counts"] == {
        "waiting": 1,
        "running": 0,
        "requeued": 0,
        "interrupted": 0,
        "cancelled": 0,
        "completed": 4,
        "pruned": 0,
        "failed": 1,
        "damaged": 0,
    }
    assert counts_line(status) == "1 failed, 4 completed, 1 waiting of 6 trials"


def test_brackets_in_a_cause_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    wide_console().print("RuntimeError: [/a/pair.cc:561] closed")
    assert "[/a/pair.cc:561] closed" in capsys.readouterr().out


def test_a_summary_counts_each_run_once_by_where_it_stands(view: View) -> None:
    made = view.sweep
    depth_1, depth_2, pointwise = ([t for t in made.trials if t.label == name] for name in ("depth 1", "depth 2", "pointwise"))
    more = build_trials(sweep(), sweep().paper, 5, "local", [])[6:]
    made = dataclasses.replace(made, trials=[*made.trials, *more])
    by = {(t.label, t.seed): t for t in made.trials}
    for configuration, seed, status in (
        ("depth 2", 44, RunStatus.pruned),
        ("depth 2", 45, RunStatus.pruned),
        ("depth 1", 44, RunStatus.failed),
    ):
        made.run(by[configuration, seed]).prepare(by[configuration, seed].config)
        made.run(by[configuration, seed]).write_result(RunResult(status, "why", device_hours=0.125))
    claims.cancel(made.trial_dir(by["depth 2", 46]))
    lines = {line["setting"]: line for line in table(tables.summary_csv(View(made)))}
    counts = {name: tuple(line[key] for key in ("failed", "pruned", "unfinished", "device_hours")) for name, line in lines.items()}
    assert counts == {"depth 1": ("1", "0", "2", "1.125"), "depth 2": ("1", "2", "1", "1.0"), "pointwise": ("0", "0", "4", "0.5")}
    assert [len(found) for found in (depth_1, depth_2, pointwise)] == [2, 2, 2]
    found = tables.peoples_table(View(made))
    reported = {line[0].text: line[found.header.index("left out")].text for line in found.lines}
    assert reported == {"depth 1": "1 failed, 2 pending", "depth 2": "1 failed, 2 pruned, 1 pending", "pointwise": "4 pending"}


def test_names_with_the_signs_of_a_format_stay_in_their_cell(view: View) -> None:
    view.sweep.trials[:] = [dataclasses.replace(t, label=f"{t.label} | 50 & _{t.label}") for t in view.sweep.trials]
    markdown = [line for line in tables.markdown_table(view).splitlines() if line.startswith("| ")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in markdown}) == 1
    assert any(line.startswith(r"| depth 2 \| 50 & _depth 2 |") for line in markdown)
    latex = [line for line in tables.latex_table(view).splitlines() if line.endswith(r"\\")]
    assert len({len(re.findall(r"(?<!\\)&", line)) for line in latex}) == 1
    assert any(line.startswith(r"  depth 2 | 50 \& \_depth 2 & 70.0 (1) $\dagger$ & ") for line in latex)


def test_latex_has_a_word_for_each_sign_that_it_reads_otherwise() -> None:
    assert tables.tex(r"a\b~c^d") == r"a\textbackslash{}b\textasciitilde{}c\textasciicircum{}d"
    assert tables.tex("100 % & $5 #1 _x {y} ± † p < 0.1 > 0") == (r"100 \% \& \$5 \#1 \_x \{y\} $\pm$ $\dagger$ p $<$ 0.1 $>$ 0")
    assert tables.tex("top-1, -1.5") == "top-1, $-$1.5"  # a hyphen, and a minus


def test_scores_that_are_no_percentages_keep_the_digits_that_tell_them_apart_and_a_lower_one_may_lead() -> None:
    runs: list[list[float]] = [[0.0031, 0.0033], [2.3026], [1500.0, 1512.0], [], [1.0, 1.0]]
    shown = [str(FineSpread(*vars(Spread.of(values)).values())) for values in runs]
    assert shown == ["0.00320 ± 0.00014", "2.303", "1506.0 ± 8.5", "-", "1 ± 0"]

    def summary(configuration: str, *values: float) -> Summary:
        fine = FineSpread(*vars(Spread.of(values)).values())
        return Summary(configuration, {OBJECTIVE: fine}, 0, 0, 0, 0, 0.0, {}, {}, {OBJECTIVE: dict(enumerate(values))})

    lead = leader([summary("a", 0.03, 0.04), summary("b", 0.01, 0.02), summary("c", 0.021, 0.02)], OBJECTIVE, sign=-1)
    assert lead is not None
    assert lead.other is not None
    assert (lead.best.label, lead.other.label) == ("b", "c")
    assert judged(lead).startswith("difference -0.0055 (95 % interval ")


def test_of_equal_means_the_first_leads_and_is_compared_with_the_next_and_no_other(tmp_path: Path) -> None:
    def summary(configuration: str, *values: float) -> Summary:
        by_seed = dict(enumerate(values, 42))
        return Summary(configuration, {OBJECTIVE: Spread.of(values)}, 0, 0, 0, 0, 0.0, {}, {}, {OBJECTIVE: by_seed})

    table = [summary("a", 70.0, 72.0), summary("b", 71.0, 71.0), summary("c", 10.0, 12.0), summary("none")]
    found = leader(table, OBJECTIVE)
    assert found is not None
    assert found.other is not None
    assert (found.best.label, found.other.label) == ("a", "b")
    assert found.comparison == compare({42: 70.0, 43: 72.0}, {42: 71.0, 43: 71.0})
    assert leader([summary("none")], OBJECTIVE) is None
    alone = leader(table[2:], OBJECTIVE)
    assert alone is not None
    assert (alone.best.label, alone.other, alone.comparison, alone.significant) == ("c", None, None, False)
    assert Spread.of([1.0, 2.0, 4.0]) == Spread(pytest.approx(7 / 3), pytest.approx((7 / 3) ** 0.5), 3)


def error_bars(axis: Any) -> list[tuple[float, float | None]]:
    """(mean, standard deviation) of each row that has one, from the lines as they are drawn."""
    found = []
    for bars in axis.containers:
        (mean,), ends = bars.lines[0].get_xdata(), [segment[:, 0] for line in bars.lines[2] for segment in line.get_segments()]
        found.append((float(mean), float(ends[0][1] - ends[0][0]) / 2 if ends and len(ends[0]) else None))
    return found


def test_the_picture_shows_each_configurations_seeds_mean_deviation_and_published_value(
    view: View, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "_write_figure", lambda figure, path: drawn.append(figure))
    plots.draw(view, tmp_path / "ablation.png")
    (figure,) = drawn
    axis = figure.axes[view.sweep.headline.index(LINEAR)]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["depth 2", "depth 1", "pointwise"]
    points = {marker: [list(line.get_xdata()) for line in axis.lines if line.get_marker() == marker] for marker in ("o", "D")}
    assert points == {"o": [[71.0], [61.0, 65.0], [41.0]], "D": [[73.22], [64.86]]}
    assert [mean for mean, _ in error_bars(axis)] == [71.0, 63.0, 41.0]
    assert error_bars(axis)[1][1] == pytest.approx(8**0.5)
    assert "n = 1 to 2, ranked by linear top-1, held-out" in figure.get_suptitle()
