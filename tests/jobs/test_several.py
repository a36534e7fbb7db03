"""Several values for one key, typed to a command that runs one configuration: one line that says which command takes them."""

import sys

import pytest

from jobs import pretrain
from jobs.config import compose_job, split_multirun
from sweeps.cli.plan import parse, plan
from sweeps.predictor_ablation import SWEEP

SWEPT = "a sweep compares them over seeds: python -m sweeps new NAME writes one"


@pytest.mark.parametrize(
    "word",
    [
        "optimizer.lr=0.01,0.03",
        "method.predictor.depth=1,2",
        "seed=1,2",
        "encoder.name=resnet18,resnet50",
        "precision=fp32,bf16",
        "encoder.sync_bn=true,false",
        "data=digits,fashion_mnist",
        "method=simclr,byol",
        "epochs=range(1,5)",
        "optimizer.lr=choice(0.01,0.03)",
    ],
)
def test_the_line_names_the_commands_that_take_them_whatever_the_key(word: str) -> None:
    key, _, value = word.partition("=")
    shown = f"'{word}'" if "(" in word else word
    with pytest.raises(ValueError, match="one value") as said:
        compose_job([word])
    assert str(said.value) == f"{key} must have one value; got {value}: python -m jobs.pretrain -m {shown} runs each, and {SWEPT}"


def test_what_is_named_is_what_runs_them() -> None:
    assert split_multirun(["optimizer.lr=0.01,0.03"]) == [["optimizer.lr=0.01"], ["optimizer.lr=0.03"]]
    assert len(split_multirun(["epochs=range(1,5)"])) == 4


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("probes.names=linear,knn", "probes.names must be a list; got linear,knn: write 'probes.names=[linear,knn]'"),
        ("probes.at_epochs=1,2", "probes.at_epochs must be a list; got 1,2: write 'probes.at_epochs=[1,2]'"),
        ("lr=0.1,0.2", "lr must be a key of the configuration; got lr=0.1,0.2; did you mean optimizer.lr?"),
    ],
)
def test_a_list_and_an_unknown_key_have_their_own_line(word: str, message: str) -> None:
    with pytest.raises(ValueError, match="must") as said:
        compose_job([word])
    assert str(said.value) == message


def test_a_text_may_hold_a_comma() -> None:
    assert compose_job(["data.root=/a,/b"]).train.data.root == "/a,/b"


def test_a_single_run_and_a_sweep_end_with_it_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: object
) -> None:
    monkeypatch.setattr(sys, "argv", ["pretrain", "optimizer.lr=0.01,0.03"])
    assert pretrain.main() == 2
    assert capsys.readouterr().err.startswith("error: optimizer.lr must have one value; got 0.01,0.03: python -m jobs.pretrain -m ")
    with pytest.raises(ValueError, match=r"epochs must have one value; got 1,2: "):
        plan(SWEEP, parse(SWEEP, ["--dry-run", "--runs-dir", str(tmp_path), "epochs=1,2"]))
