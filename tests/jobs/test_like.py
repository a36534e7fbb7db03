"""`jobs.pretrain --like TRIAL`: a run is written as overrides that make it alone, and changed by others."""

import contextlib
import io
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cnnjepa.models.encoders import build_encoder
from cnnjepa.run.folder import RunFolder
from cnnjepa.run.identity import signature
from jobs import pretrain
from jobs.config import compose_job, default_run_dir
from jobs.like import expanded, overrides_of
from jobs.planned import planned, with_weights_of_a_trial
from sweeps import __main__ as commands
from sweeps.method_comparison import SWEEP as METHODS
from sweeps.report import one_trial
from sweeps.spec.sweep import ScaleName, build_trials
from sweeps.state.view import View
from tests.support.reported import CLEAR, claimed, failed, made
from tests.support.searched import run_to_the_end, searched


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> View:
    found = made(tmp_path_factory.mktemp("sweep"), {k: v[:1] for k, v in CLEAR.items()}, seeds=2)
    claimed(found, 4, 1, 1.0)
    claimed(found, 4, 2, 1.0)
    failed(found, 4, "NonFiniteError: loss nan", "epoch 1\nTraceback\nNonFiniteError: loss nan\n")
    return View(found.sweep)


def composed(line: str) -> str:
    words = shlex.split(line)
    assert words[:3] == ["python", "-m", "jobs.pretrain"]
    typed, _ = expanded(words[3:])
    return signature(compose_job(typed).train)


def shown(*words: str) -> tuple[int, str]:
    said, before = io.StringIO(), sys.argv
    sys.argv = ["sweeps", *words]
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            status = commands.main()
    finally:
        sys.argv = before
    return status, said.getvalue()


def test_the_command_that_runs_a_trial_alone_makes_the_same_run(view: View, tmp_path: Path) -> None:
    for trial in view.sweep.trials:
        assert composed(one_trial.alone(view, trial)) == trial.signature
        assert composed(shlex.join(["python", "-m", "jobs.pretrain", "--like", str(view.sweep.path / trial.name)])) == trial.signature
    search = searched(tmp_path, [1], max_trials=3)
    run_to_the_end(search, lambda trial: 50.0)
    for trial in search.trials:
        assert composed(one_trial.alone(View(search), trial)) == trial.signature


def test_other_methods_and_folders_of_earlier_versions_are_written_too() -> None:
    trials = build_trials(METHODS, METHODS.scale(ScaleName.paper), 1, "local", ["data.root=/a b,c", "micro_batch_size=512"])
    for number, given in ((2, True), (2, False), (5, False)):
        trial = trials[number]
        words = overrides_of(trial.config, trial.overrides if given else [])
        assert signature(compose_job(words).train) == trial.signature


def test_a_change_makes_a_run_of_its_own_and_says_what_differs(view: View) -> None:
    trial = view.sweep.trials[1]
    words, original = expanded(
        [
            "--like",
            str(view.sweep.path / "1"),
            "epochs=9",
            "method.predictor.depth=3",
            "cluster=komondor",
            "account=abc",
            "micro_batch_size=8",
        ]
    )
    job = compose_job(words)
    assert original is not None
    assert job.cluster.name == "komondor"
    assert job.run_dir.parent.name == "single"
    changed = "epochs: 4 -> 9; method.predictor.depth: 2 -> 3; micro_batch_size: 16 -> 8"
    said = f"(run ID {trial.signature}): {changed}; run ID {signature(job.train)}"
    assert original.line(job).endswith(said)
    words, original = expanded([f"--like={view.sweep.path / 'trials' / trial.signature}", "method=byol"])
    assert not [word for word in words if word.startswith("method.")]  # a preset that is given anew brings its own keys
    assert original is not None
    assert "method.name: cnn_jepa -> byol" in original.line(compose_job(words))


@pytest.mark.parametrize(
    "typed", [["-m", "--like", "TRIAL", "epochs=2,3"], ["epochs=2,3", "--like=TRIAL", "-m"], ["--like", "TRIAL", "-m"]]
)
def test_options_may_stand_before_and_after_it(view: View, typed: list[str]) -> None:
    words, _ = expanded([word.replace("TRIAL", str(view.sweep.path / "0")) for word in typed])
    asked = pretrain.command_line().parse_args(words)
    assert asked.multirun
    assert "seed=42" in asked.overrides


def test_a_trial_that_is_unknown_or_no_run_is_refused_in_one_line(view: View, tmp_path: Path) -> None:
    for named, said in {
        f"{view.sweep.path}/17": r"^TRIAL must name one trial by .*; got 17, which names none of 6 trials, numbered from 0 to 5$",
        str(tmp_path): "^--like must be SWEEP_FOLDER/TRIAL, or a run folder with config.yaml; got ",
        "no/such": "^--like must be SWEEP_FOLDER/TRIAL, or a run folder with config.yaml; got no/such$",
    }.items():
        with pytest.raises(ValueError, match=said):
            expanded(["--like", named, "epochs=2"])


def test_weights_from_takes_its_configuration_and_starts_from_its_encoder(view: View, tmp_path: Path) -> None:
    folder = view.sweep.trial_dir(view.sweep.trials[3])
    words, original = expanded(["--weights-from", f"{view.sweep.path}/3", "epochs=8"])
    assert original is not None
    assert original.named == f"{view.sweep.path}/3"
    assert words[-1] == f"encoder.weights={folder}"
    assert words[0] == "epochs=8"
    again = compose_job(words, validated=False).train
    assert replace(again.encoder, weights="") == view.sweep.trials[3].config.encoder
    # What that run itself started from is of no consequence.
    base = [word for word in words[1:] if not word.startswith("encoder.weights")]
    started = compose_job([*base, "encoder.weights=/gone.pth", "encoder.weights_digest=ab", "encoder.weights_keys=[a=b]"], validated=False)
    RunFolder(tmp_path / "run").prepare(started.train)
    alike, _ = expanded([f"--like={tmp_path / 'run'}"])
    assert compose_job(alike, validated=False).train.encoder == started.train.encoder, "what it started from, and under which names"
    words, _ = expanded([f"--weights-from={tmp_path / 'run'}"])
    assert [word for word in words if word.startswith("encoder.weights")] == [f"encoder.weights={tmp_path / 'run'}"]
    with pytest.raises(ValueError, match=r"--weights-from must be given without --like, whose configuration it takes too; got --like x"):
        expanded(["--like", "x", "--weights-from", "y"])
    with pytest.raises(ValueError, match=r"^--weights-from must be SWEEP_FOLDER/TRIAL, or a run folder with config.yaml; got no/such$"):
        expanded(["--weights-from", "no/such"])


def test_weights_may_be_named_as_a_trial(view: View, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = replace(view.sweep.trials[0].config, encoder=replace(view.sweep.trials[0].config.encoder, weights=f"{view.sweep.path}/3"))
    folder = view.sweep.trial_dir(view.sweep.trials[3])
    folder.mkdir(parents=True, exist_ok=True)
    assert with_weights_of_a_trial(asked).encoder.weights == str(folder)
    other = replace(asked, encoder=replace(asked.encoder, weights="timm:resnet18"))
    assert with_weights_of_a_trial(other) == other
    monkeypatch.setattr("cnnjepa.weights.read", lambda source: build_encoder(asked.encoder, 32, 1, 3).state_dict())
    job = compose_job(
        [f"encoder.weights={folder}", "data=digits", f"encoder.width={asked.encoder.width}", f"cluster.runs_dir={tmp_path}"],
        validated=False,
    )
    new, lines = planned(job)
    assert new.train.encoder.weights_digest
    assert new.run_dir == default_run_dir(job.cluster, new.train) != default_run_dir(job.cluster, job.train)
    assert lines[0].startswith(f"encoder.weights {folder}: ")


def test_pretrain_runs_it_in_the_users_folder(
    view: View, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = []
    monkeypatch.setattr(pretrain, "run_job", lambda job, stop: jobs.append(job))
    runs = f"cluster.runs_dir={tmp_path / 'runs'}"
    monkeypatch.setattr(sys, "argv", ["pretrain", "--like", str(view.sweep.path / "depth 2" / "43"), "epochs=8", runs])
    pretrain.main()
    assert "epochs: 4 -> 8; run ID" in capsys.readouterr().out
    assert [job.run_dir.parent for job in jobs] == [tmp_path / "runs" / "single"]
    assert RunFolder(jobs[0].run_dir).config().epochs == 8


def test_show_tells_all_about_a_trial(view: View) -> None:
    status, text = shown("show", str(view.sweep.path), "4")
    assert status == 0
    lines = text.splitlines()
    assert lines[0] == "04-depth2-seed43: failed: NonFiniteError: loss nan"
    assert "what differs from the first configuration, depth 1" in lines
    assert "  method.predictor.depth: 1 -> 2" in lines
    assert [line for line in lines if line.startswith("  2: ") and "gpu02, job 7_0, " in line]
    assert lines[-1] == "  | NonFiniteError: loss nan"
    trial = view.sweep.trials[4]
    assert composed(lines[lines.index("to run it alone") + 1].strip()) == trial.signature
    found = json.loads(shown("show", str(view.sweep.path), trial.name, "--json")[1])
    assert (found["run_id"], found["folder"]) == (trial.signature, str(view.sweep.trial_dir(trial)))
    assert found["hyperparameters"]["method.predictor.depth"] == 2
    assert [a["node"] for a in found["attempts"]] == ["gpu01", "gpu02"]


def test_show_compares_two_trials_and_their_scores(view: View) -> None:
    _, text = shown("show", str(view.sweep.path), "01-depth2-seed42", "0")
    assert "  linear.holdout_top1 = 75.20 %; 00-depth1-seed42: 60.00" in text
    assert "what differs from 00-depth1-seed42\n  method.predictor.depth: 1 -> 2\nattempts" in text
    status, said = shown("show", str(view.sweep.path), "depth2-seed43")
    assert status == 2
    assert said.startswith("error: TRIAL must name one trial by ")
    assert "; the nearest: 04-depth2-seed43" in said
