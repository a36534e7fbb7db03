"""A command that would take trials out of the tables asks first; refused commands leave no folder behind."""

import dataclasses
import io
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from rich.console import Console

from cnnjepa.run.folder import RunFolder, RunResult, RunStatus
from jobs import pretrain
from sweeps import run as run_from_python
from sweeps.cli import withdrawal
from sweeps.cli.plan import parse, plan
from sweeps.cli.run import run
from sweeps.cli.withdrawal import settle_withdrawn
from sweeps.execution.scheduler import next_claim
from sweeps.report.status import nothing_to_run
from sweeps.spec.sweep import Configuration, Scale, SweepSpec
from sweeps.state import claims
from sweeps.state.claims import Process
from sweeps.state.folder import Sweep
from sweeps.state.view import View
from tests.support import forked
from tests.support.killed_run import configured, loaded
from tests.support.searched import end, searched
from tests.support.tiny import OVERRIDES

_TASK = """
import dataclasses
from sweeps import PlainTask

@dataclasses.dataclass
class Config:
    lr: float = 0.1
    width: int = 8
    seed: int = 42
    epochs: int = 2

def train(config, run):
    run.report(1, loss=1.0)

TASK = PlainTask(Config, train, objective="loss", minimized=["loss"])
"""
RATES = [Configuration({"lr": lr}) for lr in (0.1, 0.2)]


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> SweepSpec:
    """A sweep of two rates, of a task that does nothing."""
    file = tmp_path_factory.mktemp("own") / "rates_task.py"
    file.write_text(_TASK)
    scale = Scale([], seeds=2)
    made, _ = configured(SweepSpec("rates", "Which?", configurations=RATES, smoke=scale, paper=scale, task=loaded(file).TASK))
    return made


def ended(sweep: Sweep, number: int, status: RunStatus = RunStatus.completed) -> None:
    folder = RunFolder(sweep.trial_dir(sweep.trials[number]))
    folder.prepare(sweep.trials[number].config)
    folder.write_result(RunResult(status, cause="" if status is RunStatus.completed else "it broke", metrics={"loss": 1.0}))


@pytest.fixture
def begun(spec: SweepSpec, tmp_path: Path) -> Sweep:
    """A sweep of two seeds: of the first, one trial is completed and one has begun; of the second, one has failed."""
    sweep, _ = plan(spec, parse(spec, ["--runs-dir", str(tmp_path / "runs")]))
    sweep.write()
    ended(sweep, 0)
    RunFolder(sweep.trial_dir(sweep.trials[1])).prepare(sweep.trials[1].config)
    owned = claims.claim(sweep.trial_dir(sweep.trials[1]), 1, "driver", 0)
    assert owned is not None
    with owned:
        pass
    ended(sweep, 2, RunStatus.failed)
    return sweep


def asked(spec: SweepSpec, sweep: Sweep, *words: str) -> tuple[Sweep, Namespace]:
    found = parse(spec, ["--runs-dir", str(sweep.path.parent), *words])
    found.agrees = found.yes
    return plan(spec, found)[0], found


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


CHANGES = {
    "fewer seeds": (["--seeds", "1"], RATES, r"1 failed \(\d\d-lr0\.1-seed43\)"),
    "another base": (["width=9", "--name", "rates-smoke"], RATES, r"1 completed, 1 interrupted, 1 failed \(\d\d-lr0\.1-seed42; .*; .*\)"),
    "fewer configurations": ([], RATES[1:], r"1 completed, 1 failed \(\d\d-lr0\.1-seed42; \d\d-lr0\.1-seed43\)"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_trials_that_have_begun_leave_the_tables_only_if_a_person_agrees(begun: Sweep, spec: SweepSpec, change: str) -> None:
    words, configurations, lost = CHANGES[change]
    spec = dataclasses.replace(spec, configurations=configurations)
    before = contents(begun.path.parent)
    said = (
        rf"rates-smoke must keep its trials that have begun; this command leaves out {lost}: --yes takes them out, .*; --name NAME begins"
    )
    with pytest.raises(ValueError, match=said):
        run(spec, ["--runs-dir", str(begun.path.parent), *words])
    with pytest.raises(ValueError, match=said):
        run_from_python(spec, *[w for w in words if "=" in w], runs_dir=begun.path.parent, quiet=True, **_options(words))
    sweep, dry = asked(spec, begun, *words, "--dry-run")
    shown = Console(file=io.StringIO(), width=400)
    settle_withdrawn(sweep, dry, shown)
    assert "without --dry-run, --yes takes them out" in shown.file.getvalue()  # type: ignore[attr-defined]
    settle_withdrawn(*asked(spec, begun, *words, "--yes"), Console())
    assert contents(begun.path.parent) == before


def _options(words: list[str]) -> dict[str, str]:
    return {word.removeprefix("--"): words[i + 1] for i, word in enumerate(words) if word.startswith("--")}


@pytest.mark.parametrize(("answer", "goes_on"), [("y", True), (" YES ", True), ("", False), ("n", False)])
def test_at_a_terminal_it_is_a_question(begun: Sweep, spec: SweepSpec, monkeypatch: pytest.MonkeyPatch, answer: str, goes_on: bool) -> None:
    monkeypatch.setattr(withdrawal.sys.stdin, "isatty", lambda: True, raising=False)
    questions: list[str] = []
    monkeypatch.setattr("builtins.input", lambda text: questions.append(text) or answer)
    if goes_on:
        settle_withdrawn(*asked(spec, begun, "--seeds", "1"), Console())
    else:
        with pytest.raises(ValueError, match="must keep its trials"):
            settle_withdrawn(*asked(spec, begun, "--seeds", "1"), Console())
    assert questions[0].endswith("Take them out of the tables? Their folders stay. [y/N] ")


def test_what_takes_nothing_out_asks_nothing(begun: Sweep, spec: SweepSpec) -> None:
    for words in ([], ["--seeds", "3"], ["--retry-failed"], ["--name", "other", "width=9"], ["width=9"]):
        settle_withdrawn(*asked(spec, begun, *words), Console())
    more = dataclasses.replace(spec, configurations=[*RATES, Configuration({"lr": 0.3})])
    settle_withdrawn(*asked(more, begun), Console())
    never_begun = dataclasses.replace(begun, path=begun.path.with_name("rates-smoke-2"))
    never_begun.write()
    settle_withdrawn(dataclasses.replace(never_begun, trials=begun.trials[:1]), Namespace(agrees=False, dry_run=False), Console())


def test_trials_that_a_search_chooses_meanwhile_are_not_left_out(tmp_path: Path) -> None:
    made = searched(tmp_path)
    planned = dataclasses.replace(made, trials=list(made.trials), _next=[1])
    end(made, made.trials[0], 40.0)
    assert next_claim(View(made), Process.me().driver) is not None
    end(made, made.trials[1], 50.0)
    settle_withdrawn(planned, Namespace(agrees=False, dry_run=False), Console())
    assert len(planned.trials) == 2


def test_an_answer_that_is_not_new_says_so(begun: Sweep) -> None:
    assert nothing_to_run(View(begun)) == []
    ended(begun, 1)
    ended(begun, 3)
    (line,) = nothing_to_run(View(begun))
    assert line.startswith("nothing to run: 3 completed, 1 failed of 4 trials, the last on 20")
    assert line.endswith("; --retry-failed runs failed ones again")
    done = dataclasses.replace(begun, trials=[begun.trials[i] for i in (0, 1, 3)])
    (line,) = nothing_to_run(View(done))
    assert line.startswith("nothing to run: all 3 trials completed on 20")


SWEEPS = {
    "an unknown key": ["wdith=9"],
    "a wrong value": ["width=x"],
    "a swept key": ["lr=3"],
    "a rule": ["epochs=0"],
    "an unknown profile": ["--cluster", "nowhere"],
    "an option of Slurm": ["--backend", "array"],
    "an option of an allocation": ["--nodes", "2"],
    "seeds": ["--seeds", "0"],
    "a limit": ["--max-gpu-hours", "-1"],
    "no place for rungs": ["--early-stopping", "asha"],
    "a warning that there is not": ["--prune-on", "nothing"],
    "both choices": ["--keep", "--rerun"],
    "a name": ["--name", "a/b"],
    "more cores than there are": ["cores_per_trial=100000"],
    "more devices than there are": ["gpus_per_trial=8"],
}


@pytest.mark.parametrize("case", SWEEPS)
def test_a_refused_sweep_leaves_no_folder(spec: SweepSpec, tmp_path: Path, case: str) -> None:
    words = ["--runs-dir", str(tmp_path / "a" / "b"), *SWEEPS[case]]
    with pytest.raises((ValueError, SystemExit)):
        run(spec, words)
    assert list(tmp_path.iterdir()) == []


def test_a_refused_search_and_a_missing_data_set_leave_no_folder(tmp_path: Path) -> None:
    from sweeps.joint_search import SWEEP

    runs = ["--runs-dir", str(tmp_path / "runs")]
    small = [*OVERRIDES, "data=imagefolder", f"data.root={tmp_path / 'none'}"]
    for words in (["--two-objectives", "--sampler", "multi_fidelity"], ["--max-trials", "0"], ["--eta", "1"], small, ["device=cuda"]):
        with pytest.raises(ValueError, match="must"):
            run(SWEEP, [*runs, *words])
    assert list(tmp_path.iterdir()) == []


SINGLE = {
    "an unknown key": ["epoch=3"],
    "a rule": ["epochs=0"],
    "no images": ["data=imagefolder", "data.root=none"],
    "no device": ["device=cuda"],
    "a data set that is not there": ["data=imagenet100", "data.root=none", "encoder.name=resnet50"],
    "a batch that ranks cannot share": ["global_batch_size=5", "micro_batch_size=4"],
    "a grid of which one is refused": ["-m", "epochs=1,0"],
    "a grid of one on a device that is not here": ["-m", "epochs=1,2", "device=cuda"],
    "an option between overrides": ["epochs=1", "--multi", "optimizer.lr=0.1"],
}


@pytest.mark.parametrize("case", SINGLE)
def test_a_refused_run_leaves_no_folder(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pretrain", *_single(tmp_path), *SINGLE[case]])
    assert pretrain.main() == 2
    assert list(tmp_path.iterdir()) == []


def _single(runs: Path) -> list[str]:
    return [f"runs_dir={runs / 'runs'}", "data=digits", "optimizer.warmup_epochs=0"]


@pytest.mark.slow
def test_a_launcher_that_there_is_not_leaves_no_folder(tmp_path: Path) -> None:
    done = forked.run(["-m", "jobs.pretrain", *_single(tmp_path), "-m", "epochs=1,2", "hydra/launcher=nowhere"], cwd=tmp_path)
    assert done.returncode in (1, 2), done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_for_slurm_leaves_no_folder_where_there_is_none(spec: SweepSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="must be used where Slurm is installed"):
        run(spec, ["--runs-dir", str(tmp_path / "a" / "b"), "--cluster", "komondor", "account=abc"])
    assert list(tmp_path.iterdir()) == []


def test_options_of_a_single_run_stand_between_overrides() -> None:
    found = pretrain.command_line().parse_args(["epochs=1", "-m", "optimizer.lr=0.1,0.2", "--cfg", "job", "a.b=1"])
    assert (found.overrides, found.multirun, found.cfg) == (["epochs=1", "optimizer.lr=0.1,0.2", "a.b=1"], True, "job")
