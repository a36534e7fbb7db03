"""--until-decided adds seeds to those that may be the best, in rounds, and claims no more often than 5 %."""

import dataclasses
import io
import random
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import norm

from cnnjepa.run.folder import RunFolder, RunResult, RunStatus
from jobs.cluster import ClusterProfile
from sweeps.cli.plan import parse, plan
from sweeps.cli.run import run
from sweeps.cli.until_decided import first_line, next_round
from sweeps.cli.withdrawal import withdrawn
from sweeps.report.aggregate import leader_of, summaries
from sweeps.report.best import looks_line
from sweeps.report.html_text import beside_the_answer
from sweeps.report.looks import found_in_most, level_at, levels
from sweeps.spec.sweep import Configuration, Scale, SweepSpec, Trial
from sweeps.state.folder import Sweep
from sweeps.state.view import View
from tests.support.killed_run import configured, loaded
from tests.support.searched import run_to_the_end, searched

_TASK = """
import dataclasses
import random
from sweeps import PlainTask

@dataclasses.dataclass
class Config:
    lead: float = 0.0
    seed: int = 42
    epochs: int = 1

def train(config, run):
    for epoch in run.epochs():
        run.report(epoch, accuracy=70 + config.lead + random.Random(f"{config.lead} {config.seed}").gauss(0, 1))

TASK = PlainTask(Config, train, objective="accuracy", unit="%")
"""
LEADS = (0.0, 0.2, 3.5, 1.8)


def test_the_looks_share_one_error_rate_and_the_last_has_most() -> None:
    found = levels(3, 10)
    assert len(found) == 8
    assert list(found) == sorted(found)
    assert found[0] < 0.001
    assert found[-1] > 0.015
    steps = np.random.default_rng(0).normal(size=(200_000, 10)).cumsum(1)[:, 2:] / np.sqrt(np.arange(3, 11))
    crossed = (np.abs(steps) > norm.isf(np.array(found) / 2)).any(1).mean()
    assert crossed == pytest.approx(0.025, abs=0.0015)
    assert (np.abs(steps) > norm.isf(0.0125)).any(1).mean() > 0.06, "what looking at 2.5 % each time would claim"
    assert levels(5, 5) == (pytest.approx(0.025, abs=2e-4),)
    assert (level_at(7, []), level_at(7, [3, 10])) == (0.05, found[4])
    assert (level_at(2, [3, 10]), level_at(12, [3, 10])) == (found[0], found[-1])


def test_the_lead_that_is_found_is_found_in_four_sweeps_of_five() -> None:
    lead = found_in_most(2.0, [3, 10])
    draws = np.random.default_rng(1).normal(size=(100_000, 2)) * 2.0 / np.sqrt(10)
    z = (lead + draws[:, 0] - draws[:, 1]) / (2.0 * np.sqrt(2 / 10))
    assert (z > norm.isf(levels(3, 10)[-1] / 2)).mean() == pytest.approx(0.8, abs=0.01)


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> SweepSpec:
    file = tmp_path_factory.mktemp("own") / "leads_task.py"
    file.write_text(_TASK)
    scale = Scale([], seeds=2)
    configurations = [Configuration({"lead": lead}) for lead in LEADS]
    made, _ = configured(SweepSpec("leads", "Which?", configurations=configurations, smoke=scale, paper=scale, task=loaded(file).TASK))
    return made


def planned(spec: SweepSpec, runs: Path, *words: str) -> tuple[Sweep, Namespace, ClusterProfile]:
    asked = parse(spec, ["--runs-dir", str(runs), *words])
    asked.agrees = asked.yes
    sweep, cluster = plan(spec, asked)
    return sweep, asked, cluster


def noisy(trial: Trial) -> float:
    lead = trial.values["lead"]
    return float(70 + lead + random.Random(f"{lead} {trial.seed}").gauss(0, 1))


def end_all(sweep: Sweep, score: Callable[[Trial], float | None], hours: float = 0.0) -> None:
    for trial in sweep.trials:
        folder = RunFolder(sweep.trial_dir(trial))
        if folder.result() is None:
            value = score(trial)
            folder.prepare(trial.config)
            status = RunStatus.failed if value is None else RunStatus.completed
            folder.write_result(
                RunResult(
                    status, metrics={} if value is None else {"accuracy": value}, cause="" if value else "it broke", device_hours=hours
                )
            )


def rounds(spec: SweepSpec, runs: Path, score: Callable[[Trial], float | None], *words: str, hours: float = 0.0) -> tuple[list[Sweep], str]:
    """The sweep after each round, planned again by the same command in between, and all that was said."""
    console = Console(file=io.StringIO(), width=400)
    found = []
    while True:
        sweep, asked, cluster = planned(spec, runs, *words)
        sweep.write()
        end_all(sweep, score, hours)
        found.append(sweep)
        assert len(found) < 20
        if (more := next_round(sweep, asked, cluster, console)) is None:
            return found, console.file.getvalue()  # type: ignore[attr-defined]
        more.write()


def test_those_that_may_be_the_best_get_seeds_until_one_is(spec: SweepSpec, tmp_path: Path) -> None:
    found, said = rounds(spec, tmp_path, noisy, "--until-decided", "8")
    last = found[-1]
    seeds = Counter(t.values["lead"] for t in last.trials)
    assert said.splitlines()[-1].startswith("decided after 6 seeds: lead 3.5 is the best (p = 0.0")
    assert seeds == {3.5: 6, 1.8: 6, 0.2: 6, 0.0: 5}, "those that are ruled out get no further seeds"
    assert len(said.splitlines()) == len(found) == 5
    assert said.splitlines()[0].startswith("not decided after 2 seeds: 4 configurations get a further seed; about ")
    assert sorted(t.number for t in last.trials) == list(range(len(last.trials)))
    for earlier, later in pairwise(found):
        numbers = {t.signature: t.number for t in later.trials}
        assert all(numbers[t.signature] == t.number for t in earlier.trials)
    assert Sweep.load(last.path).until == [2, 8]
    # What a page says is by the level of that look.
    view = View(last)
    table = summaries(view)
    lead = leader_of(view, table, "accuracy")
    assert lead is not None
    assert lead.significant
    assert lead.level == levels(2, 8)[4]
    assert any("after 6 the best is called so if p is at most 0.0" in line for line in beside_the_answer(view))
    # Without the option, and with fewer seeds than there are, nothing is lost.
    for words in ([], ["--until-decided", "8"], ["--seeds", "2"]):
        again, asked, cluster = planned(spec, tmp_path, *words)
        assert {t.signature for t in again.trials} == {t.signature for t in last.trials}
        assert withdrawn(again)[1] == []
        assert next_round(again, asked, cluster, Console(file=io.StringIO())) is None
    with pytest.raises(
        ValueError, match=r"--until-decided must stay as the sweep began, .*; got 9, and it was 8: give 8, or another --name"
    ):
        planned(spec, tmp_path, "--until-decided", "9")


def test_equal_ones_end_at_the_most_seeds_and_that_is_said(spec: SweepSpec, tmp_path: Path) -> None:
    equal = dataclasses.replace(spec, configurations=spec.configurations[:2])
    found, said = rounds(equal, tmp_path, lambda t: 70.0 + (t.seed + (t.values["lead"] > 0)) % 2, "--until-decided", "5")
    assert Counter(t.values["lead"] for t in found[-1].trials) == {0.0: 5, 0.2: 5}
    assert said.splitlines()[-1] == "not decided after 5 seeds, and no further seed is left to add"
    assert [line.rpartition(" ")[2] for line in said.splitlines()[:-1]] == ["6", "4", "2"]


def test_a_configuration_that_fails_gets_no_further_seed(spec: SweepSpec, tmp_path: Path) -> None:
    few = dataclasses.replace(spec, configurations=spec.configurations[:3])

    def score(trial: Trial) -> float | None:
        return None if trial.values["lead"] == 0.2 else random.Random(f"{trial.values['lead']} {trial.seed}").gauss(70, 1)

    found, _ = rounds(few, tmp_path, score, "--until-decided", "3")
    assert Counter(t.values["lead"] for t in found[-1].trials) == {0.0: 3, 0.2: 2, 3.5: 3}


def test_it_says_first_what_it_may_cost_and_ends_at_the_cap(spec: SweepSpec, tmp_path: Path) -> None:
    sweep, asked, cluster = planned(spec, tmp_path, "--until-decided", "8", "--max-gpu-hours", "14")
    guess = "about 12 further runs if one leads all by 2 standard deviations of a seed, at most 24; after 2 seeds it is said by the scores"
    assert first_line(sweep).endswith(f"up to 8: {guess}")
    sweep.write()
    end_all(sweep, noisy, hours=1.0)
    on_gpus = dataclasses.replace(cluster, gpus_per_trial=1)
    console = Console(file=io.StringIO(), width=400)
    more = next_round(sweep, asked, on_gpus, console)
    assert more is not None
    more.write()
    end_all(more, noisy, hours=1.0)
    assert next_round(more, asked, on_gpus, console) is None
    said = console.file.getvalue().splitlines()[-1]  # type: ignore[attr-defined]
    assert said == ("not decided after 3 seeds: 12.0 GPU-hours are spent and the next 4 runs may take 4.0, above --max-gpu-hours 14")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--until-decided", "2"], "--until-decided must be above the 2 seeds that each configuration gets at first; got 2"),
        (["--until-decided", "0"], "--until-decided must be at least 1; got 0"),
        (["--until-decided", "many"], "--until-decided must be of type int; got many"),
    ],
)
def test_what_makes_no_sense_is_refused(spec: SweepSpec, tmp_path: Path, words: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        planned(spec, tmp_path, *words)


def test_the_finalists_of_a_search_get_seeds_and_its_baseline_as_many(tmp_path: Path) -> None:
    sweep = searched(tmp_path, seeds=2, max_trials=5)
    sweep.until.extend([2, 4])
    asked, cluster = Namespace(until_decided=4, max_gpu_hours=None), ClusterProfile("local")
    console = Console(file=io.StringIO(), width=400)
    held: list[int] = []
    for _ in range(3):
        run_to_the_end(sweep, lambda t: random.Random(t.signature).gauss(50, 1))
        held.append(max(Counter(t.configuration for t in View(sweep).sweep.trials).values()))
        more = next_round(sweep, asked, cluster, console)
        if more is None:
            break
        more.write()
        sweep = Sweep.load(more.path)
    assert held == [2, 3, 4]
    assert console.file.getvalue().splitlines()[-1] == "not decided after 4 seeds, and no further seed is left to add"  # type: ignore[attr-defined]
    counts = Counter(t.configuration for t in sweep.trials)
    assert counts["0"] == 4
    assert sum(n > 1 for n in counts.values()) >= 3
    lead = leader_of(View(sweep), summaries(View(sweep)), sweep.objective)
    assert lead is not None
    assert looks_line(View(sweep), lead).startswith("looks after 2 to 4 seeds share 2.5 %: after 4 ")


@pytest.mark.slow
def test_one_command_runs_all_rounds(
    spec: SweepSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["leads.py"])
    pair = dataclasses.replace(spec, configurations=[spec.configurations[0], spec.configurations[2]])
    assert run(pair, ["--runs-dir", str(tmp_path), "--until-decided", "4"]) == 0
    said = capsys.readouterr().out
    assert "until decided: after 2 seeds, those that may be the best get further ones, up to 4: about " in said
    assert "not decided after 2 seeds: 2 configurations get a further seed" in said
    done = View(Sweep.load(tmp_path / "leads-smoke"))
    assert all(done.result(t) is not None for t in done.sweep.trials)
    assert len(done.sweep.trials) > 4
    assert (tmp_path / "leads-smoke" / "report.html").exists()
