"""Where a search ends: nothing new is left, too much failed, or the budget pays no further run. And what depends on a run's own epochs."""

import dataclasses
import json
from pathlib import Path

import pytest

from cnnjepa.run.folder import RunStatus
from jobs.cluster import ClusterProfile
from jobs.config import compose_job
from jobs.task import Task
from sweeps.cli.estimate import estimate_of
from sweeps.execution.scheduler import judge, next_claim, probed_at_rungs
from sweeps.search import search
from sweeps.search.search import Outlook
from sweeps.spec.scales import SMOKE
from sweeps.spec.space import Dimension, choice, real, spread_out, whole
from sweeps.spec.sweep import Scale, SweepSpec
from sweeps.state.folder import Sweep
from sweeps.state.view import View, with_objective
from tests.support.searched import OBJECTIVE, end, run_to_the_end, searched
from tests.support.shipped import Trainer, in_process, run
from tests.support.tiny_search import SWEEP

CONV, DEPTH = "method.predictor.conv", "method.predictor.depth"
KINDS = choice(CONV, "depthwise", "dense", "pointwise")
RATE = SWEEP.space[0]


def spec(*space: Dimension, **more: object) -> SweepSpec:
    scale = Scale(SMOKE, seeds=1, max_trials=4)
    return SweepSpec("edges", "?", space=space, smoke=scale, paper=scale, **more)  # type: ignore[arg-type]


def states(runs: Path) -> list[str]:
    return sorted(json.loads(p.read_text())["status"] for p in runs.glob("*/trials/*/result.json"))


def small(tmp_path: Path, *space: Dimension, **changes: object) -> Sweep:
    return searched(tmp_path, spec=dataclasses.replace(SWEEP, space=space), **changes)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_condition_on_one_word_runs_all_its_configurations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_process(monkeypatch, Trainer(without_value=False))
    kernel = choice("method.predictor.kernel", 3, 5, when=(CONV, "depthwise"))
    status, said = run(spec(KINDS, kernel), "--runs-dir", str(tmp_path), "--max-trials", "9", "--early-stopping", "none")
    assert status == 0, said
    assert states(tmp_path) == ["completed"] * 4
    assert "all 4 configurations of the space were tried: nothing new is left" in said


@pytest.mark.slow
@pytest.mark.parametrize("words", [[], ["--two-objectives"]], ids=["accuracy", "accuracy and hours"])
def test_what_cannot_change_a_result_leaves_a_search_that_ends_with_its_table(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_process(monkeypatch, Trainer(without_value=False))
    status, said = run(spec(choice("data.workers", 0, 1), choice(DEPTH, 1, 3)), "--runs-dir", str(tmp_path), *words)
    assert status == 0, said
    assert states(tmp_path) in (["completed"] * 2, ["completed", "pruned"])
    assert ("data.workers cannot change a result: it is not searched and stays 0" in said) is not bool(words)
    assert "all 2 configurations of the space were tried: nothing new is left" in said
    assert "edges (smoke): best first" in said


@pytest.mark.slow
def test_a_search_stops_after_so_many_failures_and_goes_on_when_more_are_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_process(monkeypatch, Trainer(failing=range(1000)))
    words = ["--runs-dir", str(tmp_path), "--max-trials", "6", "--max-failures"]
    status, said = run(spec(RATE), *words, "2")
    assert status == 1
    assert states(tmp_path) == ["failed"] * 2
    assert f"the search has stopped: 2 runs failed or have no {OBJECTIVE}, as many as --max-failures allows: give --retry-failed" in said
    assert run(spec(RATE), *words, "3")[0] == 1
    assert states(tmp_path) == ["failed"] * 3


def test_runs_without_the_objective_count_as_failures_and_pruned_ones_do_not(tmp_path: Path) -> None:
    made = small(tmp_path, RATE, max_failures=3, max_trials=20)
    endings = [(None, RunStatus.completed), (None, RunStatus.pruned), (50.0, RunStatus.completed), (None, RunStatus.failed)]
    view, begun = View(made), 0
    while (got := next_claim(view, "d")) is not None:
        with got[1]:
            end(made, got[0], *endings[begun % 4])
        begun += 1
    assert begun == 5  # the first, the fourth and the fifth
    assert Outlook(view).failures == 3
    assert search.is_over(view)
    missing = view.result(made.trials[0]).missing  # type: ignore[union-attr]
    assert missing == {OBJECTIVE: "the run has no metrics"}


def test_a_probe_that_failed_explains_the_objective_that_is_missing(tmp_path: Path) -> None:
    made = small(tmp_path, RATE)
    end(made, made.trials[0], None)
    result = made.run(made.trials[0]).result()
    assert result is not None
    with_cause = dataclasses.replace(result, missing={"linear": "ValueError: features are not finite"})
    assert with_objective(with_cause, OBJECTIVE) is with_cause
    assert with_objective(dataclasses.replace(result, metrics={OBJECTIVE: 1.0}), OBJECTIVE).missing == {}
    other = dataclasses.replace(result, metrics={"linear.holdout_top_1": 1.0})
    said = "the run has no value of it, but linear.holdout_top_1; did you mean linear.holdout_top_1?"
    assert with_objective(other, OBJECTIVE).missing == {OBJECTIVE: said}


def test_a_task_that_declares_no_metrics_is_asked_by_its_first_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Task, "declares_metrics", False)
    made = small(tmp_path, RATE)
    end(made, made.trials[0], None)
    assert search.choose(View(made)) is None
    assert search.why_over(View(made)) == (
        f"the search has stopped: no run has {OBJECTIVE}, and the first has completed: correct the sweep's objective"
    )


# The budget.


def test_a_budget_holds_where_epochs_are_searched(tmp_path: Path) -> None:
    """At an hour for an epoch, whatever is chosen: what would exceed the budget is drawn again, and cheap runs use what is left."""
    for number, budget in enumerate([6.0, 11.0, 20.0, 33.0]):
        made = small(tmp_path / str(number), whole("epochs", 2, 12), RATE, max_trials=50, budget_hours=budget)
        view = View(made)
        while (got := next_claim(view, "d")) is not None:
            with got[1]:
                end(made, got[0], 50.0, hours=float(got[0].epochs))
        spent = sum(t.epochs for t in made.trials)
        assert budget - 2 < spent <= budget
        assert search.is_over(view)
        assert search.why_over(view).startswith(f"no further run fits the budget of {budget:g} device-hours, of which {spent} are spent")


def test_a_budget_that_pays_only_what_was_tried_ends_the_search(tmp_path: Path) -> None:
    """4 hours are left, and the one configuration that is new takes 8; the cheapest takes 3 and has been tried."""
    made = small(tmp_path, choice("epochs", 3, 4, 8), max_trials=3, budget_hours=11.0)
    view = View(made)
    while (got := next_claim(view, "d")) is not None:
        with got[1]:
            end(made, got[0], 50.0, hours=float(got[0].epochs))
    assert [t.epochs for t in made.trials] == [4, 3]
    assert search.is_over(View(Sweep.load(made.path)))
    assert "no further run fits the budget of 11 device-hours" in search.why_over(View(made))


def test_what_is_noted_as_exhausted_holds_until_something_changes(tmp_path: Path) -> None:
    made = small(tmp_path, choice("epochs", 4, 8), max_trials=2, budget_hours=5.0)
    end(made, made.trials[0], 50.0, hours=4.0)
    view = View(made)
    view.sweep.note_exhausted(Outlook(view).situation)
    assert Outlook(view).to_begin == 0
    richer = dataclasses.replace(made, search=dataclasses.replace(made.search, budget_hours=50.0))
    assert Outlook(View(richer)).to_begin == 1
    (made.path / "exhausted").write_bytes(b"\xff")
    assert Outlook(View(made)).untried == 1


def test_the_price_of_a_run_is_that_of_its_own_kind(tmp_path: Path) -> None:
    batch = choice("global_batch_size", 32, 64)
    made = small(tmp_path, batch, RATE, max_trials=20, budget_hours=100.0)
    end(made, made.trials[0], 50.0, hours=4.0)
    wide = made.search.trial(1, 1, {"global_batch_size": 64, "optimizer.lr": 0.01}, 42)  # type: ignore[union-attr]
    assert Outlook(View(made)).price(wide.values) == 4.0  # of the one kind that is known
    assert made.register(wide)
    made.grow()
    end(made, wide, 50.0, hours=12.0)
    outlook = Outlook(View(made))
    assert (outlook.price(made.trials[0].values), outlook.price(wide.values)) == (4.0, 12.0)
    assert outlook.cheapest == 4.0
    assert outlook.left == 84.0


def test_an_estimate_takes_the_longest_run_that_a_search_may_choose(tmp_path: Path) -> None:
    local = compose_job([]).cluster
    assert isinstance(local, ClusterProfile)
    made = small(tmp_path, whole("epochs", 2, 40), RATE, max_trials=3)
    assert estimate_of(View(made), local, False).epochs == 4 + 2 * 40


# Rungs.


def test_each_run_is_compared_at_the_same_share_of_its_own_epochs(tmp_path: Path) -> None:
    made = small(tmp_path, choice("epochs", 4, 8, 16), RATE, rungs=[4, 8], eta=2, max_trials=9)
    assert made.search is not None
    trials = [made.search.trial(n, n, {"epochs": e, "optimizer.lr": 0.001 * n}, 42) for n, e in enumerate([4, 8, 16, 16]) if n]
    for trial in trials:
        assert made.register(trial)
    made.grow()
    assert [made.rungs_of(t) for t in made.trials] == [[1, 2], [2, 4], [4, 8], [4, 8]]
    assert all(set(made.rungs_of(t)) <= set(probed_at_rungs(made, t).probes.at_epochs) for t in made.trials)
    end(made, made.trials[0], 60.0, e2=60.0)
    end(made, made.trials[1], 70.0, e4=70.0)
    view = View(made)
    assert list(view.rung_values(8, 42).values()) == [60.0, 70.0]  # both at half of their epochs
    assert list(view.rung_values(4, 42).values()) == []
    verdict = judge(view, made.trials[2])
    assert verdict(8, {OBJECTIVE: 65.0}) == f"{OBJECTIVE} 65.00 at epoch 8 is not among the best 1/2 of 3 runs"
    assert verdict(8, {OBJECTIVE: 75.0}) == verdict(2, {OBJECTIVE: 1.0}) == ""


def test_runs_of_the_same_epochs_have_the_rungs_of_the_sweep(tmp_path: Path) -> None:
    made = searched(tmp_path, [2])
    assert made.rungs_of(made.trials[0]) == [2]
    assert probed_at_rungs(made, made.trials[0]) is made.trials[0].config


# Spaces.


def test_a_space_is_listed_ever_denser_and_to_its_ends() -> None:
    space = [real("a", 0.001, 10.0, log=True), whole("b", 1, 1000)]
    found = [p for _, p in zip(range(9), spread_out(space, {}), strict=False)]
    assert [(round(float(p["a"]), 6), p["b"]) for p in found] == [(a, b) for a in (0.001, 0.1, 10.0) for b in (1, 500, 1000)]
    assert len(list(spread_out([choice("a", 1, 2, 3), whole("b", 1, 3)], {}))) == 9
    assert {p["b"] for p in spread_out([whole("b", 1, 1000)], {})} == set(range(1, 1001))


def test_few_new_configurations_among_many_options_are_found(tmp_path: Path) -> None:
    """Once every other option was tried, one in twenty draws finds a rate that is new."""
    seeds = choice("probes.linear_paper_epochs", *range(20, 40))
    rate = dataclasses.replace(RATE, when=("probes.linear_paper_epochs", (30,)))
    made = small(tmp_path, seeds, rate, max_trials=30)
    begun = run_to_the_end(made, lambda _: 50.0)
    assert len({t.signature for t in begun}) == 30
