"""Early warnings: each is said when its threshold is passed and not before, and prunes only where that is asked."""

import csv
import dataclasses
import io
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from cnnjepa.config import WarningConfig
from cnnjepa.probe_config import ProbeConfig
from cnnjepa.run.folder import RunResult, RunStatus
from cnnjepa.run.losses import LossCurve
from cnnjepa.warnings import early_warnings
from sweeps.execution.changes import announce_changes, left_to_run
from sweeps.execution.scheduler import judge
from sweeps.report.status import sweep_status, trial_status, warning_lines
from sweeps.search.warnings import as_lines, check_pruning, warnings_of
from sweeps.spec.sweep import ScaleName, build_trials
from sweeps.state import claims
from sweeps.state.folder import Sweep
from sweeps.state.view import View
from tests.support import forked
from tests.support.tiny_sweep import sweep

ROOT = Path(__file__).parents[3]
SCRIPT = str(ROOT / "tests" / "support" / "tiny_sweep.py")


def values(**changes: float) -> dict[str, Any]:
    """A configuration of 100 epochs at a learning rate of 0.01, with other thresholds."""
    optimizer = {"lr": 0.01, "warmup_epochs": 10.0}
    return {"warnings": asdict(WarningConfig(**changes)), "probes": asdict(ProbeConfig()), "optimizer": optimizer, "epochs": 100}


def steps(losses: list[float], until: float, lr: float = 0.009) -> list[dict[str, Any]]:
    """Records, evenly spread over the epochs to `until`."""
    return [
        {"kind": "step", "step": i + 1, "epoch": until * (i + 1) / len(losses), "loss": loss, "lr": lr} for i, loss in enumerate(losses)
    ]


def noisy(fall: float, n: int = 1000, noise: float = 0.01) -> list[float]:
    """A loss that goes from 1 to 1 - fall, with noise that averages out."""
    return [1 - fall * i / n + noise * (1 if i % 2 else -1) for i in range(n)]


def names(probes: dict[str, dict[str, float]], curve: LossCurve | None = None, **changes: float) -> list[str]:
    return [w.name for w in early_warnings(probes, curve, values(**changes))]


def features(std: float, rankme: float) -> dict[str, float]:
    return {"collapse.feature_std": std, "collapse.rankme": rankme}


def test_healthy_features_say_nothing_and_no_probe_says_nothing() -> None:
    assert names({}) == []
    assert names({"1": features(0.5, 12.0), "2": features(0.4, 11.0)}) == []
    assert names({"1": {"linear.holdout_top1": 50.0}}) == []


def test_spread_features_between_the_two_thresholds_are_warned_of_and_below_the_lower_the_run_fails_anyhow() -> None:
    limits = {"feature_std": 0.1}
    assert names({"5": features(0.1, 12.0)}, **limits) == []
    assert names({"5": features(0.0999, 12.0)}, **limits) == ["feature_std"]
    assert names({"5": features(0.0099, 12.0)}, **limits) == []
    assert names({"5": features(0.0999, 12.0), "10": features(0.2, 12.0)}, **limits) == []  # it has recovered


def test_rankme_is_compared_with_a_floor_and_a_share_of_its_own_best() -> None:
    limits = {"rankme": 3.0, "rankme_share": 0.5}
    assert names({"1": features(0.5, 2.9)}, **limits) == ["rankme"]
    found = early_warnings({"1": features(0.5, 8.0), "9": features(0.5, 20.0), "10": features(0.5, 9.0)}, None, values(**limits))
    assert [(w.name, w.epoch, w.value, w.threshold) for w in found] == [("rankme", 10.0, 9.0, 10.0)]
    assert found[0].line.startswith("rankme: collapse.rankme is 9 at epoch 10, below 10 (0.5 of the 20 at epoch 9); ")
    assert names({"1": features(0.5, 8.0), "9": features(0.5, 20.0), "10": features(0.5, 10.0)}, **limits) == []


def test_a_knn_score_is_warned_of_when_all_the_last_probes_are_down() -> None:
    def probed(*scores: float) -> dict[str, dict[str, float]]:
        return {str(i): {"knn.holdout_top1": score} for i, score in enumerate(scores, start=1)}

    limits = {"knn_drop": 5.0, "knn_probes": 2}
    assert names(probed(40.0, 34.0), **limits) == []  # one bad probe is no trend
    assert names(probed(40.0, 34.0, 35.1), **limits) == []
    assert names(probed(40.0, 34.0, 35.0), **limits) == []  # not more than 5 below
    assert names(probed(40.0, 34.0, 34.9), **limits) == ["knn"]
    line = early_warnings(probed(40.0, 34.0, 34.9), None, values(**limits))[0].line
    assert line.startswith("knn: knn.holdout_top1 is at best 34.9 in the last 2 probes, more than 5 below the 40.0 at epoch 1; ")
    assert names(probed(40.0, 34.9), knn_drop=5.0, knn_probes=1) == ["knn"]


def test_epochs_are_numbers_and_not_words() -> None:
    probes = {"9": features(0.5, 20.0), "10": features(0.5, 9.0), "100": features(0.5, 19.0)}
    assert names(probes, rankme_share=0.9) == []


@pytest.mark.parametrize(
    ("losses", "until", "lr", "said"),
    [
        (noisy(0.0), 50, 0.009, True),
        (noisy(-0.1), 50, 0.009, False),  # it rises, and does not stand still
        (noisy(0.1), 50, 0.009, False),  # 2 % from half to half
        (noisy(0.0), 50, 0.004, False),  # the schedule is near its end
        (noisy(0.0), 25, 0.009, False),  # warm-up is part of what would be compared
        (noisy(0.0, noise=0.2), 50, 0.009, False),  # noise could hide a fall
        (noisy(0.0, n=6), 50, 0.009, False),  # too few records
        ([0.0] * 1000, 50, 0.009, False),  # nothing is trained
        ([-x for x in noisy(0.0)], 50, 0.009, True),  # BYOL's loss is negative
        ([-1 - 0.1 * i / 1000 for i in range(1000)], 50, 0.009, False),
    ],
)
def test_a_plateau_is_what_has_certainly_not_improved_at_a_high_learning_rate(
    losses: list[float], until: float, lr: float, said: bool
) -> None:
    curve = LossCurve.of(steps(losses, until, lr), epochs=100)
    limits = {"plateau_share": 0.2, "plateau_change": 0.005, "plateau_lr": 0.5}
    assert names({}, curve, **limits) == (["loss"] if said else [])


def test_a_line_says_what_was_seen_the_threshold_and_what_to_do() -> None:
    found = early_warnings({}, LossCurve.of(steps(noisy(0.01), 50), epochs=100), values(plateau_change=0.005))
    assert found[0].line == (
        "loss: the mean loss fell by 0.20 ± 0.20 % over the last 20 % of the run, until epoch 50, a change of less than 0.5 %; "
        "more epochs at this optimizer.lr gain nothing: try another rate, or fewer epochs"
    ), found[0].line


def test_a_file_that_grows_gives_the_same_curve_and_is_read_once(tmp_path: Path) -> None:
    path, records = tmp_path / "metrics.jsonl", steps(noisy(0.05), 60)
    lines = [json.dumps(r) + "\n" for r in records]
    curve = LossCurve(100)
    curve.read(path, 1.0)  # not there yet
    for start in range(0, 1000, 130):
        with open(path, "a") as file:
            file.write("".join(lines[start : start + 130])[:-7])  # a torn line
        curve.read(path, 1.0)
        with open(path, "a") as file:
            file.write("".join(lines[start : start + 130])[-7:])
    curve.read(path, 1.0)
    whole = LossCurve.of(records, 100)
    assert curve.halves(0.2, 0) == whole.halves(0.2, 0)
    late = LossCurve(100)
    late.read(path, 0.2)
    assert late.halves(0.2, 0) == whole.halves(0.2, 0)
    assert sum(n for n, _, _ in late._sums.values()) < 450  # of 1000: what the last fifth needs, and a margin
    assert late.halves(0.6, 0) is None  # it was not read so far back


def test_a_resumed_run_writes_a_new_file_and_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in steps([5.0] * 100, 50)))
    curve = LossCurve(100)
    curve.read(path, 0.2)
    beside = tmp_path / "beside"
    again = steps([1.0] * 200, 60)
    beside.write_text("".join(json.dumps(r) + "\n" for r in again))
    beside.replace(path)
    curve.read(path, 0.2)
    assert curve.halves(0.2, 0) == LossCurve.of(again, 100).halves(0.2, 0)


# In a sweep's folder, without training.


def planned(path: Path, *overrides: str, prune_on: tuple[str, ...] = ()) -> Sweep:
    spec = sweep()
    trials = build_trials(spec, spec.smoke, 1, "local", ["probes.at_epochs=[1,2]", *overrides])
    made = Sweep.of(spec, ScaleName.smoke, trials, path / "tiny_sweep-smoke")
    made.prune_on.extend(prune_on)
    made.write()
    return Sweep.load(made.path)


def record(made: Sweep, epoch: int, **metrics: float) -> None:
    """A probe of the first trial."""
    folder = made.run(made.trials[0])
    folder.prepare(made.trials[0].config)
    line = {"kind": "probe", "step": 5 * epoch, "epoch": float(epoch), **{k.replace("__", "."): v for k, v in metrics.items()}}
    with open(folder.path / "metrics.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def test_the_judge_prunes_for_what_the_sweep_names_and_for_nothing_else(tmp_path: Path) -> None:
    for name, prune_on, pruned in (("a", (), False), ("b", ("feature_std",), False), ("c", ("knn", "rankme"), True)):
        made = planned(tmp_path / name, "warnings.rankme=5", prune_on=prune_on)
        assert made.prune_on == list(prune_on)
        record(made, 1, collapse__rankme=3.0)
        cause = judge(View(made), made.trials[0])(1, {"collapse.rankme": 3.0})
        assert cause == ("warning rankme: collapse.rankme is 3 at epoch 1, below 5 (the floor)" if pruned else "")
        assert judge(View(made), made.trials[1])(1, {"collapse.rankme": 5.1}) == ""


def test_a_pruned_run_stays_so_while_the_sweep_prunes_for_its_warning(tmp_path: Path) -> None:
    made = planned(tmp_path, prune_on=("rankme",))
    folder = made.run(made.trials[0])
    folder.prepare(made.trials[0].config)
    folder.write_result(RunResult(RunStatus.pruned, "warning rankme: collapse.rankme is 3 at epoch 1, below 5 (the floor)"))
    assert made.trials[0] not in left_to_run(View(made), retry_failed=False)
    made.prune_on[:] = ["knn"]
    assert made.trials[0] in left_to_run(View(made), retry_failed=False)


def test_status_shows_warnings_of_running_and_of_ended_trials(tmp_path: Path) -> None:
    made = planned(tmp_path, "warnings.rankme=5")
    view = View(made)
    assert trial_status(view, made.trials[0])["warnings"] == []
    record(made, 1, collapse__rankme=3.0)
    assert [w.name for w in warnings_of(view, made.trials[0])] == ["rankme"]
    done = RunResult(RunStatus.completed, metrics={"collapse.rankme": 4.0, "linear.holdout_top1": 50.0})
    made.run(made.trials[0]).write_result(done)
    view = View(made)
    found = sweep_status(view)
    assert [w["epoch"] for w in found["trials"][0]["warnings"]] == [4.0]
    assert json.loads(json.dumps(found)) == found
    lines = warning_lines(view, found)
    assert len(lines) == 1
    assert lines[0].startswith("warning: 00-depth1-seed42: rankme: collapse.rankme is 4 at epoch 4, below 5 (the floor); ")


def test_pruning_needs_probes_on_the_way_and_known_names(tmp_path: Path) -> None:
    check_pruning(planned(tmp_path, prune_on=("rankme", "loss")))
    with pytest.raises(ValueError, match=r"--prune-on must be one of feature_std, rankme, knn, loss; got luck"):
        check_pruning(planned(tmp_path, prune_on=("luck",)))
    with pytest.raises(ValueError, match=r"must give a probe before epoch 4 to prune on rankme.*add 'probes\.at_epochs=\[2\]'"):
        check_pruning(planned(tmp_path, "probes.at_epochs=[4]", prune_on=("rankme",)))
    check_pruning(planned(tmp_path, "probes.at_epochs=[]", "probes.every_epochs=1", prune_on=("rankme",)))


def test_no_more_warnings_are_shown_than_fit_and_how_many_are_left(tmp_path: Path) -> None:
    made = planned(tmp_path)
    first, second, third = (t.signature for t in made.trials)
    lines = {first: [f"a{i}" for i in range(5)], third: ["c"], second: ["b0", "b1"]}
    in_order = [f"warning: {made.trials[i].name}: {line}" for i, line in ((0, "a0"), (0, "a1"), (0, "a2"), (0, "a3"), (0, "a4"))]
    in_order += [f"warning: {made.trials[i].name}: {line}" for i, line in ((1, "b0"), (1, "b1"), (2, "c"))]
    assert as_lines(made, lines) == in_order  # eight
    assert as_lines(made, {**lines, third: ["c", "d"]}) == [*in_order, "and 1 more warnings, see --json"]
    assert as_lines(made, lines, most=6) == [*in_order[:6], "and 2 more warnings, see --json"]


@pytest.mark.parametrize(
    ("probes", "is_on_the_way"),
    [
        (["probes.every_epochs=3"], True),
        (["probes.every_epochs=4"], False),  # of 4 epochs: at the end
        (["probes.every_epochs=0"], False),
        (["probes.at_epochs=[3]", "probes.every_epochs=0"], True),
    ],
)
def test_a_probe_on_the_way_comes_before_the_last_epoch(tmp_path: Path, probes: list[str], is_on_the_way: bool) -> None:
    spec = sweep()
    trials = build_trials(spec, spec.smoke, 1, "local", probes)
    made = Sweep.of(spec, ScaleName.smoke, trials, tmp_path)
    made.prune_on.append("loss")
    if is_on_the_way:
        check_pruning(made)
        return
    with pytest.raises(ValueError, match=r"must give a probe before epoch 4 to prune on loss, .* add 'probes\.at_epochs=\[2\]'"):
        check_pruning(made)


# With real training.


def rows(runs: Path) -> list[dict[str, str]]:
    with open(runs / "tiny_sweep-smoke" / "results.csv") as file:
        return list(csv.DictReader(file))


@pytest.mark.nightly
@pytest.mark.slow
def test_a_threshold_that_must_fire_prunes_where_that_is_asked_and_only_there(tmp_path: Path) -> None:
    def run(*more: str, starts_ray: bool = True) -> str:
        line = [
            SCRIPT,
            "--runs-dir",
            str(tmp_path),
            "--seeds",
            "1",
            "warnings.rankme=1000",
            "probes.at_epochs=[1,2]",
            *more,
        ]
        if starts_ray:
            done = subprocess.run([sys.executable, *line], cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
        else:
            done = forked.run(line)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("--prune-on", "rankme")
    assert [r["state"] for r in rows(tmp_path)] == ["pruned"] * 3
    assert all(r["cause"].startswith("warning rankme: collapse.rankme is ") for r in rows(tmp_path))
    trials = list((tmp_path / "tiny_sweep-smoke" / "trials").iterdir())
    assert {json.loads((t / "result.json").read_text())["step"] for t in trials} == {5}  # of 20: at the first probe
    assert "at once" not in run("--prune-on", "rankme", starts_ray=False)  # pruned is pruned
    run()
    assert [r["state"] for r in rows(tmp_path)] == ["completed"] * 3
    for trial in trials:
        assert (trial / "log" / "train.log").read_text().count("step 1/20 ") == 1  # it went on from its checkpoint
    said = forked.run(["-m", "sweeps", "status", str(tmp_path / "tiny_sweep-smoke")]).stdout
    assert said.count("warning: ") == 3
    assert "below 1e+03 (the floor); " in said


def test_halves_are_compared_by_the_standard_error_of_their_means() -> None:
    """Of 100 epochs the last fifth is 80 parts of 400, here with a record each; by numpy, and by hand with three records a half."""
    losses = np.random.default_rng(0).normal(5.0, 0.3, 400)
    records = [{"kind": "step", "epoch": (i + 0.5) / 4, "loss": float(x), "lr": 0.1} for i, x in enumerate(losses)]
    first, second = losses[320:360], losses[360:]
    error = (first.var(ddof=1) / 40 + second.var(ddof=1) / 40) ** 0.5
    assert LossCurve.of(records, 100).halves(0.2, 0) == pytest.approx((first.mean(), second.mean(), error), rel=1e-9)
    epochs = [80.1, 81.0, 89.9, 90.1, 95.0, 99.9]
    few = [{"kind": "step", "epoch": e, "loss": x, "lr": 0.1} for e, x in zip(epochs, [1.0, 2.0, 3.0, 2.0, 2.0, 5.0], strict=True)]
    assert LossCurve.of(few, 100).halves(0.2, 0) == pytest.approx((2.0, 3.0, (1 / 3 + 3 / 3) ** 0.5))
    assert LossCurve.of([few[0], *few[3:]], 100).halves(0.2, 0) is None  # of one loss nobody knows the error
    assert LossCurve.of([*few[:2], *few[4:]], 100).halves(0.2, 0) == pytest.approx((1.5, 3.5, (0.5 / 2 + 4.5 / 2) ** 0.5))


def test_a_resumed_runs_file_is_read_from_its_beginning_also_where_it_is_longer(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in steps([5.0] * 100, 50)))
    curve = LossCurve(100)
    curve.read(path, 1.0)
    again = steps([1.0] * 400, 60)
    (tmp_path / "beside").write_text("".join(json.dumps(r) + "\n" for r in again))
    (tmp_path / "beside").replace(path)
    curve.read(path, 1.0)
    assert curve._sums == LossCurve.of(again, 100)._sums


def test_a_change_of_the_sweep_counts_what_came_and_what_went(tmp_path: Path) -> None:
    made = planned(tmp_path)
    console = Console(record=True, width=200, file=io.StringIO())
    assert not announce_changes(made, console)
    fewer = dataclasses.replace(made, trials=made.trials[:1])
    assert announce_changes(fewer, console)
    fewer.write()
    assert announce_changes(made, console)
    assert console.export_text().splitlines() == [
        "the sweep has changed since it was last run: 0 trials added, 2 withdrawn (no longer in the tables; their folders stay)",
        "the sweep has changed since it was last run: 2 trials added, 0 withdrawn (no longer in the tables; their folders stay)",
    ]


def test_what_failed_is_taken_up_where_that_is_asked_and_what_completed_never(tmp_path: Path) -> None:
    made = planned(tmp_path)
    for trial, status in zip(made.trials, (RunStatus.completed, RunStatus.failed), strict=False):
        made.run(trial).prepare(trial.config)
        made.run(trial).write_result(RunResult(status))
    assert left_to_run(View(made), retry_failed=False) == made.trials[2:]
    assert left_to_run(View(made), retry_failed=True) == made.trials[1:]


def test_jobs_of_withdrawn_trials_that_still_run_are_named_and_those_that_have_ended_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = planned(tmp_path)
    monkeypatch.setattr(View, "here", staticmethod(View))  # there is no Slurm to ask
    owners = []
    for number, (trial, shared) in enumerate(zip(made.trials, (False, True, False), strict=True)):
        owned = claims.claim(made.trial_dir(trial), 1, "d", 0, claims.SlurmStart("c", str(17 + number), 0, "n1", 1.0, "", "", shared))
        assert owned is not None
        owners.append(owned)
    made.run(made.trials[2]).write_result(RunResult(RunStatus.completed))
    console = Console(record=True, width=200, file=io.StringIO())
    with owners[0], owners[1]:
        assert announce_changes(dataclasses.replace(made, trials=[]), console)
    assert sorted(console.export_text().splitlines()[1:]) == [
        "  00-depth1-seed42: withdrawn, but its job runs to its end; to stop it: scancel 17",
        "  01-depth2-seed42: withdrawn, but its job runs to its end; to stop it: scancel 18, which also ends the other trials of that job",
    ]
