"""A program that has changed since trials began: named, and kept or run again as the user says."""

from argparse import Namespace
from pathlib import Path

import pytest
from rich.console import Console

from cnnjepa.run.folder import RunFolder, RunResult, RunStatus
from jobs import program
from sweeps.cli.plan import parse, plan
from sweeps.cli.program import settle
from sweeps.spec.sweep import SweepSpec
from sweeps.state import claims
from sweeps.state.folder import Sweep
from sweeps.state.view import View
from tests.support import forked
from tests.support.killed_run import configured, loaded

_TASK = """
import dataclasses
from sweeps import Configuration, PlainTask, SweepSpec

@dataclasses.dataclass
class Config:
    lr: float = 0.1
    seed: int = 42

def train(config, run):
    run.report(1, loss=1.0)

TASK = PlainTask(Config, train, objective="loss")
SWEEP = SweepSpec(configurations=[Configuration({"lr": lr}) for lr in (0.1, 0.2, 0.3)], task=TASK)
"""


@pytest.fixture
def begun(tmp_path: Path) -> tuple[SweepSpec, Sweep, Path]:
    """A sweep of which one trial is completed and one has begun, and the file of its program."""
    file = tmp_path / f"changing_{abs(hash(tmp_path))}.py"
    file.write_text(_TASK)
    spec, _ = configured(loaded(file).SWEEP)
    sweep, _ = plan(spec, parse(spec, ["--runs-dir", str(tmp_path / "runs")]))
    sweep.write()
    for trial in sweep.trials[:2]:
        folder = sweep.run(trial)
        folder.prepare(trial.config)
        owned = claims.claim(folder.path, 1, "driver", 0)
        assert owned is not None
        with owned:
            found = program.find(spec.task_name)
            assert found is not None
            program.note(folder.path, 1, found)
    RunFolder(sweep.trial_dir(sweep.trials[0]), 1).write_result(RunResult(RunStatus.completed, metrics={"loss": 1.0}, claim=1))
    file.write_text(_TASK.replace("loss=1.0", "loss=2.0"))
    return spec, sweep, file


def chosen(spec: SweepSpec, *options: str) -> Namespace:
    return parse(spec, list(options))


def test_a_change_is_named_and_nothing_is_done_until_the_user_chooses(begun: tuple[SweepSpec, Sweep, Path]) -> None:
    spec, sweep, file = begun
    said = rf"^{file.name} changed since 1 trial ended and 1 trial began: --keep keeps them .*; --rerun runs them again from the start$"
    with pytest.raises(ValueError, match=said):
        settle(sweep, View(sweep), chosen(spec), Console())
    with pytest.raises(ValueError, match=r"^--keep must be left out with --rerun; got both$"):
        settle(sweep, View(sweep), chosen(spec, "--keep", "--rerun"), Console())
    settle(sweep, View(sweep), chosen(spec, "--dry-run"), Console())
    assert len(list((sweep.path / "trials").iterdir())) == 2


def test_kept_trials_are_kept_for_good(begun: tuple[SweepSpec, Sweep, Path]) -> None:
    spec, sweep, file = begun
    settle(sweep, View(sweep), chosen(spec, "--keep"), Console())
    sweep.write()
    settle(sweep, View(sweep), chosen(spec), Console())
    assert [View(sweep).state(trial).name for trial in sweep.trials] == ["completed", "interrupted", "waiting"]
    file.write_text(_TASK.replace("loss=1.0", "loss=3.0"))  # another change asks again
    with pytest.raises(ValueError, match=r"changed since 1 trial ended"):
        settle(sweep, View(sweep), chosen(spec), Console())


def test_trials_that_run_again_leave_what_there_was_aside(begun: tuple[SweepSpec, Sweep, Path]) -> None:
    spec, sweep, _ = begun
    settle(sweep, View(sweep), chosen(spec, "--rerun"), Console())
    assert [View(sweep).state(trial).name for trial in sweep.trials] == ["waiting"] * 3
    aside = sorted(path.name for path in (sweep.path / "replaced").iterdir())
    assert aside == sorted(f"{trial.signature}-1" for trial in sweep.trials[:2])


def test_a_trial_that_runs_is_not_moved_away(begun: tuple[SweepSpec, Sweep, Path]) -> None:
    spec, sweep, _ = begun
    owned = claims.claim(sweep.trial_dir(sweep.trials[1]), 2, "driver", 0)
    assert owned is not None
    with owned, pytest.raises(ValueError, match=r"^--rerun must wait until none of the trials runs .*; got 01-lr0\.2-seed42, running: "):
        settle(sweep, View(sweep), chosen(spec, "--rerun"), Console())


@pytest.mark.slow
def test_an_edited_file_is_noticed_by_the_command_itself_which_runs_the_new_code_where_it_is_told_to(tmp_path: Path) -> None:
    """In processes of their own: what a sweep's folder has copied must not stand for the file that was typed."""
    file, words = tmp_path / "edited.py", ["--runs-dir", str(tmp_path / "runs"), "--dry-run"]
    named = _TASK.replace("SweepSpec(conf", "SweepSpec('edited', conf")
    file.write_text(named + "\nif __name__ == '__main__':\n    from sweeps import main\n    main(SWEEP)\n")

    def typed(*more: str, dry: bool = True) -> str:
        done = forked.run([str(file), *(words if dry else words[:-1]), *more], cwd=tmp_path)
        return f"{done.returncode}: {done.stdout}{done.stderr}"

    assert typed().startswith("0: ")
    folder = tmp_path / "runs" / "edited-smoke"
    # As a worker leaves a trial that has ended, and the command its plan.
    spec, _ = configured(loaded(file).SWEEP)
    sweep, _ = plan(spec, parse(spec, words[:-1]))
    sweep.write()
    run, found = sweep.run(sweep.trials[0]), program.find(spec.task_name)
    assert found is not None
    run.prepare(sweep.trials[0].config)
    program.note(run.path, 1, found)
    RunFolder(run.path, 1).write_result(RunResult(RunStatus.completed, metrics={"loss": 1.0}, claim=1))
    assert "changed since" not in typed()
    file.write_text(file.read_text().replace("loss=1.0", "loss=2.0"))
    assert "edited.py changed since 1 trial ended: --keep keeps them" in typed()
    refused = typed(dry=False)
    assert refused.startswith("2: ")
    assert "edited.py changed since 1 trial ended" in refused
    assert folder.is_dir()


def test_nothing_is_set_aside_while_one_of_the_trials_runs(begun: tuple[SweepSpec, Sweep, Path]) -> None:
    spec, sweep, _ = begun
    owned = claims.claim(sweep.trial_dir(sweep.trials[1]), 2, "driver", 0)
    assert owned is not None
    with owned, pytest.raises(ValueError, match=r"--rerun must wait until none of the trials runs"):
        settle(sweep, View.here(sweep), chosen(spec, "--rerun"), Console())
    assert not (sweep.path / "replaced").exists()
    assert sweep.run(sweep.trials[0]).result() is not None
