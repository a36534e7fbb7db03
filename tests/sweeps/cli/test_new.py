"""`python -m sweeps new`: a file that is planned as it stands, learns, and overwrites nothing."""

import dataclasses
import sys
from pathlib import Path

import pytest

from cnnjepa.run.folder import RunStatus
from jobs.cluster import JobSpec
from jobs.run import run_job
from sweeps import __main__ as command_line
from sweeps.cli.plan import parse, plan
from sweeps.cli.sweep_file import spec_of
from tests.support.documented import example, typed


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONPATH", "")
    return tmp_path


def called(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["sweeps", *words])
    return command_line.main()


def test_it_is_written_once_with_what_to_type_next(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert called(["new", "asked_here"], monkeypatch) == 0
    said = "asked_here.py: a sweep that learns as it stands; put your question in it\n"
    assert capsys.readouterr().out == f"{said}python -m sweeps run asked_here.py --cluster local --dry-run\n"
    (here / "asked_here.py").write_text("mine")
    for name in ("asked_here", "asked_here.py"):
        assert called(["new", name], monkeypatch) == 2
        line = f"error: NAME must be new; got {name}, and asked_here.py is there: choose another name, or edit that file\n"
        assert capsys.readouterr().err == line
    assert (here / "asked_here.py").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("my-question", "NAME must be letters, digits and _, not beginning with a digit; got my-question"),
        ("class", "NAME must be letters, digits and _, not beginning with a digit; got class"),
        ("numpy", "NAME must be no module's, which the file would hide; got numpy: choose another"),
        ("no/such", "NAME must lie in a folder that is there; got no/such: make no first"),
    ],
)
def test_a_name_that_will_not_do_is_refused(
    name: str, said: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called(["new", name], monkeypatch) == 2
    assert capsys.readouterr().err.startswith(f"error: {said}")
    assert list(here.iterdir()) == []


def learns(path: Path, folder: Path) -> float:
    """The linear probe's score on the test images, of one trial of the sweep in a file."""
    spec = spec_of(str(path)).resolved(path.stem)
    made, cluster = plan(spec, parse(spec, ["--cluster", "local", "--dry-run", "--runs-dir", str(folder)]))
    trial = made.trials[1]
    config = dataclasses.replace(trial.config, log=dataclasses.replace(trial.config.log, tensorboard=False))
    result = run_job(JobSpec(config, cluster, folder / "run"), lambda: False)
    assert result is not None
    assert result.status is RunStatus.completed
    return result.metrics["linear.test_top1"]


@pytest.mark.nightly
def test_what_it_writes_is_planned_and_learns(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert called(typed("python -m sweeps new my_question", {})[3:], monkeypatch) == 0
    assert called(typed("python -m sweeps run my_question.py --cluster local --dry-run", {})[3:], monkeypatch) == 0
    assert "6 trials, 4 epochs each, in " in capsys.readouterr().out
    assert typed("python -m sweeps run my_question.py --cluster local", {})[4] == "my_question.py"
    assert learns(here / "my_question.py", here / "runs") > 80  # of ten classes


@pytest.mark.nightly
@pytest.mark.parametrize(("number", "name"), [(0, "predictor_depth"), (1, "rate_and_depth")])
def test_the_examples_of_the_page_learn(number: int, name: str, here: Path) -> None:
    path = here / f"{name}.py"
    path.write_text(example("writing-a-sweep.md", "python", number))
    spec = spec_of(str(path)).resolved(name)
    words = ["--cluster", "local", "--dry-run", "--runs-dir", str(here / "runs")]
    made, cluster = plan(spec, parse(spec, words))
    result = run_job(JobSpec(made.trials[0].config, cluster, here / "runs" / "run"), lambda: False)
    assert result is not None
    assert result.metrics["linear.test_top1"] > 80


def test_what_it_writes_is_checked_as_a_whole(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert called(["new", "asked_whole"], monkeypatch) == 0
    spec = spec_of("asked_whole.py").resolved("asked_whole")
    for scale, many in (("smoke", 6), ("paper", 9)):
        made, _ = plan(spec, parse(spec, ["--scale", scale, "--dry-run", "--runs-dir", str(here / "runs")]))
        assert len(made.trials) == many
    assert not (here / "runs").exists()
