"""The page's words and numbers; that it works in a browser is in test_end_to_end.py and test_search_end_to_end.py."""

import dataclasses
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cnnjepa.run.folder import RunResult, RunStatus
from sweeps.report import html, html_text
from sweeps.report.aggregate import against_the_baseline, leader, summaries
from sweeps.report.best import score_of_best
from sweeps.report.seen import Seen
from sweeps.report.tables import write_all
from sweeps.spec.sweep import Configuration
from sweeps.state import claims
from sweeps.state.folder import Sweep
from sweeps.state.history import commands, note_command
from sweeps.state.view import View
from tests.support.reported import ALIKE, CLEAR, OBJECTIVE, claimed, embedded, failed, made

ROOT = Path(__file__).parents[3]


def test_a_winner_is_named_with_its_uncertainty(tmp_path: Path) -> None:
    view = made(tmp_path, CLEAR)
    sentence, significant = html_text.answer(view)
    assert significant
    assert sentence.startswith("the best is depth 2 with 75.5 % linear top-1, held-out (95 % interval 7")
    assert "), significantly better than all others; the next is pointwise with 60.9" in sentence
    assert sentence.startswith(
        f"the best is depth 2 with {score_of_best(view, Seen(view).lead).replace('(', 'linear top-1, held-out (')}"  # type: ignore[arg-type]
    )
    assert "95 % interval" in sentence
    assert "paired t over 3 seeds)" in sentence
    assert "among all 3 configurations p < 0.001" in sentence
    beside = html_text.beside_the_answer(view)
    assert beside[0] == "The score of the best is by seeds that did not select it; the mean of its own runs is 75.5 ± 0.4 (n = 3)."
    assert beside[1] == "1 of 3 configurations may be the best (95 % confidence)."
    assert beside[2].startswith(
        "The first configuration, depth 1, has 60.5 ± 0.5 (n = 3); the best is significantly better, judged among all"
    )
    assert html_text.tiles(view)[0] == ("depth 2", "best, statistically significant")
    assert ("4.5 core-hours", "cost of all runs") in html_text.tiles(view)
    assert '<div id="answer" class="answer significant">' in html.build(view)


def test_no_winner_is_named_where_none_is_significant(tmp_path: Path) -> None:
    sentence, significant = html_text.answer(made(tmp_path, ALIKE))
    assert not significant
    assert sentence.startswith("no configuration is significantly better than all others: depth 2 with 70.5 % linear top-1, held-out (95 %")


def test_while_runs_are_pending_the_answer_says_so(tmp_path: Path) -> None:
    view = made(tmp_path, {**CLEAR, "pointwise": [61.0, 60.2]})
    assert html_text.answer(view)[0].startswith("So far, with 1 of 9 runs pending: the best is depth 2")
    assert html_text.answer(made(tmp_path / "none", {})) == ("No run has completed yet.", False)
    broken = made(tmp_path / "broken", {}, seeds=1)
    for number in range(3):
        failed(broken, number, "why")
    assert html_text.answer(View(broken.sweep)) == ("No run has completed: 3 failed.", False)
    for empty in (made(tmp_path / "empty", {}), made(tmp_path / "one", {"depth 1": [50.0]})):
        assert "Trials" in html.build(empty)


def test_failures_are_grouped_by_cause_whatever_their_numbers(tmp_path: Path) -> None:
    view = made(tmp_path, {"pointwise": [50.0, 51.0]})
    failed(view, 0, "NonFiniteError: loss nan at step 17, rate 1e-05", "one\ntwo\nValueError: <b>bad</b>\n")
    failed(view, 1, "NonFiniteError: loss nan at step 230, rate 0.01")
    failed(view, 3, "OSError: disk")
    groups = html_text.failures(view)
    assert [(g.cause, len(g.trials)) for g in groups] == [("NonFiniteError: loss nan at step 17, rate 1e-05", 2), ("OSError: disk", 1)]
    assert groups[0].log.endswith("ValueError: <b>bad</b>")
    page = html.build(view)
    assert "ValueError: &lt;b&gt;bad&lt;/b&gt;" in page
    assert "<b>bad</b>" not in page.split('id="data"')[0]
    assert "0.75 failed" in page


def test_whatever_a_folder_says_is_text_on_the_page(tmp_path: Path) -> None:
    """Each text that comes from outside holds a tag of its own: none of them is an element, and each can be read."""
    view = made(tmp_path, {"depth 1": [50.0, 52.0], "depth 2": [61.0, 60.0]}, seeds=2)
    metric = "<t-metric>.test_top1"
    headline = [*view.sweep.headline, metric]
    sweep = dataclasses.replace(view.sweep, question="Does <t-question a='1'> matter?", name="tiny<t-name>", headline=headline)
    sweep.trials[:] = [dataclasses.replace(t, label=f"{t.label} <t-configuration>") for t in sweep.trials]
    view = View(sweep)
    failed(view, 2, "OSError: <t-cause> & more", "one\nValueError: <t-log>\n")
    record = {"commit": "<t-commit>", "diff": "", "packages": {"torch": "<t-package>"}, "python": "<t-python>", "host": "<t-host>"}
    (sweep.trial_dir(sweep.trials[0]) / "provenance.json").write_text(json.dumps(record))
    line = {"command": ["python", "<t-command>"], "commit": "c", "changed": False, "time": "<t-time>"}
    (tmp_path / "commands.jsonl").write_text(json.dumps(line) + "\n")
    run, done = sweep.run(sweep.trials[0]), view.result(sweep.trials[0])
    assert done is not None
    (sweep.trial_dir(sweep.trials[0]) / "result.json").unlink()
    run.write_result(dataclasses.replace(done, metrics={**done.metrics, metric: 1.0}))
    run.open_metrics(3)
    run.record("step", 3, {"epoch": 2.0, '"><t-curve>': 1.0})
    run.close()
    shown = html.build(View(sweep)).split('<script type="application/json"')[0]
    assert re.findall(r"<t-[^>]*>", shown) == []
    for name in (
        "question a=&#39;1&#39;",
        "name",
        "configuration",
        "cause",
        "log",
        "commit",
        "package",
        "python",
        "host",
        "command",
        "time",
    ):
        assert f"&lt;t-{name}&gt;" in shown, name
    assert re.findall("&amp;[a-z#]", shown) == []  # escaped twice
    assert "OSError: &lt;t-cause&gt; &amp; more" in shown
    assert '<option value="&#34;&gt;&lt;t-curve&gt;">&#34;&gt;&lt;t-curve&gt;</option>' in shown
    assert shown.count('<th scope="col"><button type="button">&lt;t-metric&gt; top-1, test</button></th>') == 2
    assert "<h3>&lt;t-metric&gt; top-1, test</h3>" in shown
    assert shown.count("<h1>tiny&lt;t-name&gt; (paper)</h1>") == shown.count("<title>tiny&lt;t-name&gt; (paper)</title>") == 1


def test_a_probe_without_a_value_is_a_failure_that_is_shown(tmp_path: Path) -> None:
    view = made(tmp_path, {"depth 1": [50.0]}, seeds=1)
    trial = view.sweep.trials[1]
    view.sweep.run(trial).prepare(trial.config)
    missing = {"knn": "ValueError: features are not finite"}
    view.sweep.run(trial).write_result(RunResult(RunStatus.completed, metrics={OBJECTIVE: 40.0}, missing=missing))
    assert [g.cause for g in html_text.failures(view)] == ["knn: ValueError: features are not finite"]


def test_warnings_and_advice_stand_on_the_page(tmp_path: Path) -> None:
    view = made(tmp_path, {"depth 1": [50.0]}, seeds=1)
    assert "Warnings" not in html.build(view)
    trial = view.sweep.trials[1]
    view.sweep.run(trial).prepare(trial.config)
    metrics = {OBJECTIVE: 40.0, "collapse.feature_std": 0.04}
    view.sweep.run(trial).write_result(RunResult(RunStatus.completed, metrics=metrics, seconds=90.0, step=3))
    page = html.build(view)
    assert "warning: 01-depth2-seed42: feature_std: collapse.feature_std is 0.04" in page
    assert any("collapse.feature_std is 0.04" in line for t in embedded(page)["trials"] for line in t["about"])
    assert "used at most, by 2 completed runs (counters): time " in page


def test_hours_are_shown_by_what_came_of_the_runs_and_in_their_unit(tmp_path: Path) -> None:
    view = made(tmp_path, {"depth 1": [50.0, 52.0], "depth 2": [61.0]}, seeds=2)  # of 0.5 hours each
    failed(view, 2, "why")
    assert html_text.costs(view) == [
        "1.75 core-hours in all: 1.5 completed, 0.25 failed",
        "a completed run took 0.5 core-hours and 30 min of wall-clock time, medians over configurations of their means",
    ]
    assert html_text.hours_of_a_run(view)[view.sweep.trials[2].configuration].n == 0  # it failed
    for epoch in (1, 2, 3):
        claimed(view, 0, epoch, gpus=0)
    claimed(view, 1, 1, gpus=0)
    claimed(view, 1, 2, gpus=0)
    again = View(view.sweep)
    assert html_text.costs(again)[-1].startswith("2 runs were started more than once (3 further starts in all)")
    assert html_text.hours_unit(again) == "core-hours"
    claimed(view, 5, 1, gpus=0.5)
    assert html_text.hours_unit(View(view.sweep)) == "GPU-hours"
    assert [html_text.format_hours(h) for h in (0.01234, 99.94, 100.0, 1234.5)] == ["0.0123", "99.9", "100", "1,234"]


def test_energy_is_that_of_all_runs_whose_gpus_recorded_it(tmp_path: Path) -> None:
    view = made(tmp_path, {}, seeds=2)
    for trial, kwh in zip(view.sweep.trials, (1.25, 2.5, None), strict=False):
        view.sweep.run(trial).prepare(trial.config)
        view.sweep.run(trial).write_result(RunResult(RunStatus.completed, metrics={OBJECTIVE: 1.0}, energy_kwh=kwh))
    assert html_text.costs(view)[-1] == "3.8 kWh drawn by the GPUs of 2 runs"
    assert html_text.hours_unit(view) == "GPU-hours"


def test_a_log_is_shown_by_its_last_lines_and_rare_causes_come_last(tmp_path: Path) -> None:
    view = made(tmp_path, {}, seeds=2)
    failed(view, 0, "rare", "\n".join(f"line {i}" for i in range(40)))
    for number in (1, 2, 3):
        failed(view, number, f"often {number}")
    rare = html_text.failures(view)[1]
    assert [(g.cause, len(g.trials)) for g in html_text.failures(view)] == [("often 1", 3), ("rare", 1)]
    assert rare.log.splitlines() == [f"line {i}" for i in range(26, 40)]


def test_text_cannot_end_the_script_it_stands_in(tmp_path: Path) -> None:
    view = made(tmp_path, CLEAR)
    view.sweep.trials[:] = [dataclasses.replace(t, label=t.label + "</script><!--<script>") for t in view.sweep.trials]
    page = html.build(view)
    assert embedded(page)["files"]["results.csv"].count("</script><!--<script>") == 9
    assert page.count("<script") == 3
    assert page.count("</script>") == 3


def test_the_page_asks_nobody_for_anything(tmp_path: Path) -> None:
    page = html.build(made(tmp_path, CLEAR))
    assert "default-src 'none'" in page
    assert re.search(r"<(script|img|link|iframe)[^>]+(src|href)=", page) is None


def test_the_same_folder_gives_the_same_page(tmp_path: Path) -> None:
    view = made(tmp_path, CLEAR)
    write_all(view)
    assert html.write(view).read_bytes() == html.write(View(Sweep.load(tmp_path))).read_bytes()


@pytest.mark.slow
def test_the_command_makes_the_page_of_a_sweep_that_runs(tmp_path: Path) -> None:
    view = made(tmp_path, {"depth 1": [50.0]})
    line = [sys.executable, "-m", "sweeps", "report", str(tmp_path)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == str(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == html.build(view)


def test_runs_of_several_shapes_are_counted_where_the_page_says_what_was_run(tmp_path: Path) -> None:
    view = made(
        tmp_path, {}, [Configuration({}), Configuration({"epochs": 6}), Configuration({"epochs": 6, "method.predictor.depth": 1})], seeds=1
    )
    shape = "data digits, encoder resnet_small, epochs {}, global_batch_size 32, precision fp32: {} runs"
    assert html_text.what_was_run(view)[-2:] == [shape.format(6, 2), shape.format(4, 1)]


def test_shapes_beyond_those_that_a_page_lists_are_counted(tmp_path: Path) -> None:
    view = made(tmp_path, {}, [Configuration({"epochs": n}) for n in range(2, 13)], seeds=1)
    *listed, last = html_text.what_was_run(view)[-9:]
    assert all(line.endswith(": 1 runs") for line in listed)
    assert last == "and 3 more, each in the config.yaml of its runs"


def test_commands_are_kept_once_in_a_row_and_without_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["sweeps/a.py", "token=abc", "epochs=3"])
    note_command(tmp_path)
    note_command(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sweeps/a.py"])
    note_command(tmp_path)
    with open(tmp_path / "commands.jsonl", "a") as file:
        file.write('{"torn')
    assert [c["command"] for c in commands(tmp_path)] == [["python", "sweeps/a.py", "token=***", "epochs=3"], ["python", "sweeps/a.py"]]
    assert "token=***" in " ".join(html_text.what_was_run(made(tmp_path / "x", CLEAR)) + html_text.what_was_run(made(tmp_path, {})))


def test_a_command_is_shown_so_that_it_can_be_typed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["sweeps/a.py", "--runs-dir", "/a (b)/it's", "data.root=/c, d#e"]
    monkeypatch.setattr(sys, "argv", words)
    note_command(tmp_path)
    (shown,) = [line for line in html_text.what_was_run(made(tmp_path, {})) if ": python sweeps/a.py" in line]
    assert shlex.split(shown.partition(": ")[2]) == ["python", *words]


def test_hours_are_shown_in_three_digits_and_from_100_on_in_whole_numbers() -> None:
    shown = {
        0.0: "0",
        0.012345: "0.0123",
        9.876: "9.88",
        12.34: "12.3",
        99.94: "99.9",
        100.0: "100",
        1234.5: "1,234",
        99999.6: "100,000",
    }
    assert {hours: html_text.format_hours(hours) for hours in shown} == shown


def test_costs_are_those_of_all_runs_and_of_completed_ones_and_count_further_starts(tmp_path: Path) -> None:
    view = made(tmp_path, {"depth 1": [50.0, 51.0], "depth 2": [52.0, 53.0]}, seeds=2)
    failed(view, 2, "OSError: disk")
    for number, epoch in ((0, 1), (1, 1), (1, 2), (1, 3), (3, 1), (3, 2)):
        owned = claims.claim(view.sweep.trial_dir(view.sweep.trials[number]), epoch, "d", 0)
        assert owned is not None
        with owned:
            pass
    view = View(view.sweep)
    assert html_text.costs(view) == [
        "2.25 core-hours in all: 2 completed, 0.25 failed",
        "a completed run took 0.5 core-hours and 30 min of wall-clock time, medians over configurations of their means",
        "2 runs were started more than once (3 further starts in all) and resumed from their checkpoints",
    ]
    hours = html_text.hours_of_a_run(view)
    completed = {t.label: hours[t.configuration].n for t in view.sweep.trials}
    assert completed == {"depth 1": 2, "depth 2": 2, "pointwise": 0}
    assert html_text.to_end(view) == 1
    trial = view.sweep.trials[0]
    result = dataclasses.replace(view.result(trial), energy_kwh=1.25)  # type: ignore[type-var]
    (view.sweep.trial_dir(trial) / "result.json").unlink()
    view.sweep.run(trial).write_result(result)
    assert html_text.costs(View(view.sweep))[0].startswith("2.25 GPU-hours in all: ")
    assert html_text.costs(View(view.sweep))[-1] == "1.2 kWh drawn by the GPUs of 1 runs"


def test_the_more_frequent_failure_comes_first_with_the_last_lines_of_its_log(tmp_path: Path) -> None:
    view = made(tmp_path, {})
    failed(view, 0, "OSError: disk", "".join(f"line {i}\n" for i in range(30)))
    failed(view, 1, "ValueError: a")
    failed(view, 2, "ValueError: a")
    groups = html_text.failures(view)
    assert [(g.cause, len(g.trials)) for g in groups] == [("ValueError: a", 2), ("OSError: disk", 1)]
    assert groups[1].log.splitlines() == [f"line {i}" for i in range(16, 30)]


def test_the_page_says_how_many_configurations_may_be_the_best(tmp_path: Path) -> None:
    def said(path: Path, scores: dict[str, list[float]]) -> str:
        return next(line for line in html_text.beside_the_answer(made(path, scores)) if "may be the best" in line)

    assert said(tmp_path / "alike", ALIKE) == "2 of 3 configurations may be the best (95 % confidence)."
    near = {**ALIKE, "pointwise": [69.0, 72.5, 71.0]}
    assert said(tmp_path / "near", near) == "3 of 3 configurations may be the best (95 % confidence)."


def test_runs_of_several_commits_are_counted_and_uncommitted_changes_shown(tmp_path: Path) -> None:
    view = made(tmp_path, CLEAR)
    reported = {"packages": {"torch": "2.6"}, "python": "3.11", "host": "n1"}
    for trial, (commit, diff) in zip(view.sweep.trials, [("a" * 40, ""), ("a" * 40, ""), ("b" * 40, "+x")], strict=False):
        path = view.sweep.trial_dir(trial) / "provenance.json"
        path.write_text(json.dumps({**reported, "commit": commit, "diff": diff}))
    assert html_text.what_was_run(view) == [
        f"commit {'a' * 12}: 2 runs",
        f"commit {'b' * 12} with uncommitted changes: 1 runs",
        "Python 3.11, torch 2.6",
        "host n1",
        "the runs come from several commits, which may explain differences between them",
        "data digits, encoder resnet_small, epochs 4, global_batch_size 32, precision fp32",
    ]


def test_the_best_is_compared_with_the_configuration_without_changes_which_comes_first(tmp_path: Path) -> None:
    def said(path: Path, scores: dict[str, list[float]]) -> list[str]:
        view = made(path, scores)
        table = summaries(view)
        lead = leader(table, OBJECTIVE)
        assert lead is not None
        return against_the_baseline(view, table, lead)

    (line,) = said(tmp_path / "clear", CLEAR)
    said_of_it = "The first configuration, depth 1, has 60.5 ± 0.5 (n = 3); the best is significantly better, judged among all: "
    assert line.startswith(f"{said_of_it}difference 15.0 (95 % interval ")
    assert line.endswith(": paired t over 3 seeds).")
    assert said(tmp_path / "best", {"depth 1": [80.0, 81.0], "depth 2": [70.0, 71.0]}) == ["The best is the first configuration, depth 1."]
    assert said(tmp_path / "none", {"depth 2": [70.0, 71.0], "pointwise": [60.0, 61.0]}) == [
        "The first configuration, depth 1, has no completed run to compare the best with."
    ]
