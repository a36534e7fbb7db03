"""Sweeps of another base configuration lie in folders of their own, named by what they change; what began elsewhere goes on there."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnnjepa.run.folder import RunFolder
from sweeps import learning_rate, mask_ratio, method_comparison, predictor_ablation
from sweeps.cli.folder_name import Base, overrides_in, short_names
from sweeps.cli.plan import parse, plan
from sweeps.spec.sweep import ScaleName, SweepSpec
from sweeps.state.folder import Sweep
from tests.support.killed_run import configured, loaded

_TASK = """
import dataclasses
from sweeps import Configuration, PlainTask, Scale, SweepSpec

@dataclasses.dataclass
class Config:
    lr: float = 0.1
    width: int = 8
    beta1: float = 0.9
    kind: str = "a"
    names: list[str] = dataclasses.field(default_factory=list)
    note: str = dataclasses.field(default="", metadata={"neutral": True})
    seed: int = 42
    epochs: int = 2

def train(config, run):
    run.report(1, loss=1.0)

TASK = PlainTask(Config, train, objective="loss", minimized=["loss"])
SMOKE, PAPER = Scale(["epochs=3"], seeds=1), Scale(["epochs=9"], seeds=2)
SWEEP = SweepSpec("own_rate", configurations=[Configuration({"lr": lr}) for lr in (0.1, 0.2)], task=TASK, smoke=SMOKE, paper=PAPER)
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> SweepSpec:
    """A sweep of a user's own task."""
    file = tmp_path_factory.mktemp("own") / "own_rate.py"
    file.write_text(_TASK)
    spec, _ = configured(loaded(file).SWEEP)
    return spec


def suffix(spec: SweepSpec, *overrides: str, scale: str = "smoke") -> str:
    spec = spec.resolved(spec.name)
    return Base(spec, spec.scale(ScaleName[scale]), "local", []).suffix(overrides)


def planned(spec: SweepSpec, runs: Path, *words: str) -> Sweep:
    return plan(spec, parse(spec, ["--runs-dir", str(runs), *words]))[0]


def begun(spec: SweepSpec, runs: Path, words: Sequence[str], name: str = "") -> Sweep:
    """A sweep that a command of an earlier version has begun, in the one folder that there was."""
    found = planned(spec, runs, *words)
    found = dataclasses.replace(found, path=runs / (name or f"{spec.name}-smoke"))
    found.write()
    for trial in found.trials[:1]:
        RunFolder(found.trial_dir(trial)).prepare(trial.config)
    line = {"command": ["python", f"sweeps/{spec.name}.py", "--cluster", "local", *words], "commit": "", "changed": False, "time": "t"}
    with open(found.path / "commands.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    return found


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], ""),
        (["epochs=20"], "-epochs20"),
        (["epochs=8"], ""),  # as the scale has it
        (["epochs=20", "epochs=8"], ""),  # the last one counts
        (["optimizer.lr=1e-3", "epochs=20"], "-epochs20-lr0.001"),
        (["epochs=20", "optimizer.lr=0.001"], "-epochs20-lr0.001"),
        (["optimizer.lr=1e-5"], "-lr1e-05"),
        (["optimizer.beta1=0.8"], "-beta1_0.8"),
        (["encoder.sync_bn=true"], "-sync_bn_true"),
        (["encoder={sync_bn: true}"], "-sync_bn_true"),
        (["method.ema.momentum_start=0.97"], ""),
        (["probes.names=[linear,knn]"], "-names_linear+knn"),
        (["log.tensorboard=false", "checkpoint.keep=3", "data.workers=2", "device=cpu", "encoder.execution=masked"], ""),
        (["account=abc", "cores_per_trial=2", "cluster.sbatch.constraint=x"], ""),
        (["data.root=/a b/ü"], ""),
    ],
)
def test_a_name_tells_what_changes_a_result(overrides: list[str], expected: str) -> None:
    assert suffix(predictor_ablation.SWEEP, *overrides) == expected


def test_a_name_depends_on_the_scale() -> None:
    assert suffix(predictor_ablation.SWEEP, "epochs=8", scale="paper") == "-epochs8"
    assert suffix(predictor_ablation.SWEEP, "epochs=200", scale="smoke") == "-epochs200"


def test_a_preset_is_told_by_its_name_however_it_was_typed() -> None:
    assert suffix(learning_rate.SWEEP, "encoder.width=8", "method=simclr") == "-method_simclr-width8"
    told = [suffix(learning_rate.SWEEP, "data=fashion_mnist", *more) for more in ([], ["data.test_limit=0"])]
    assert told == ["-data_fashion_mnist"] * 2


@pytest.mark.slow
def test_an_override_that_only_some_presets_feel_is_told() -> None:
    """Each method of this sweep has its own rate; that of the first is the one that is given."""
    assert suffix(method_comparison.SWEEP, "optimizer.lr=0.01") == "-lr0.01"


def test_long_names_end_in_a_digest_that_tells_them_apart() -> None:
    many = ["optimizer.beta1=0.8", "optimizer.beta2=0.95", "data.train_limit=160", "data.test_limit=60", "encoder.width=8"]
    one, other = suffix(predictor_ablation.SWEEP, *many), suffix(predictor_ablation.SWEEP, *many[:-1], "encoder.width=16")
    assert one.startswith("-test_limit60-train_limit160-")
    assert max(len(one), len(other)) < 60
    assert one != other
    assert suffix(predictor_ablation.SWEEP, *reversed(many)) == one


def test_own_tasks_and_texts_of_any_kind(own: SweepSpec) -> None:
    assert suffix(own, "width=16") == "-width16"
    assert suffix(own, "kind=b") == suffix(own, "kind='b'") == suffix(own, 'kind="b"') == "-kind_b"
    assert suffix(own, "note=anything") == suffix(own, "kind=a") == suffix(own, "beta1=9e-1") == ""
    for text in ("ü", "a b", "../up", "x" * 300, "a/b", "$(x)", "*"):
        word = suffix(own, f"kind={text}")
        assert len(word) == 9, word
        assert word[1:].isalnum()
    assert suffix(own, "kind=ü") != suffix(own, "kind=ö")
    assert suffix(own, "lr=0.3") == ""  # all configurations set it, and the command is refused


@settings(max_examples=10, deadline=None)
@given(st.dictionaries(st.sampled_from(["width", "beta1", "epochs"]), st.integers(1, 5), max_size=3), st.randoms())
def test_order_and_repetition_change_nothing(own: SweepSpec, chosen: dict[str, int], random: object) -> None:
    words = [f"{key}={value}" for key, value in chosen.items()]
    mixed = [*words, *words]
    random.shuffle(mixed)  # type: ignore[attr-defined]
    assert suffix(own, *mixed) == suffix(own, *words)


def test_a_key_has_its_shortest_name_that_no_other_has() -> None:
    keys = ["optimizer.lr", "epochs", "probes.lr", "a.b.c", "b.c", "x.y.z"]
    assert short_names(keys, keys) == {
        "optimizer.lr": "optimizer.lr", "epochs": "epochs", "probes.lr": "probes.lr", "a.b.c": "a.b.c", "b.c": "b.c", "x.y.z": "z",
    }  # fmt: skip


def test_options_never_change_the_folder(own: SweepSpec, tmp_path: Path) -> None:
    usual = tmp_path / "own_rate-smoke"
    for words in ([], ["--seeds", "3"], ["--cluster", "local"], ["--early-stopping", "none"], ["cores_per_trial=2"], ["note=x", "kind=a"]):
        assert planned(own, tmp_path, *words).path == usual
    assert planned(own, tmp_path, "--scale", "paper").path == tmp_path / "own_rate-paper"
    assert planned(own, tmp_path, "width=4", "--seeds", "2", "epochs=5").path == tmp_path / "own_rate-smoke-epochs5-width4"
    assert planned(own, tmp_path, "--name", "mine", "width=4").path == tmp_path / "mine"


def test_options_stand_between_overrides(own: SweepSpec) -> None:
    asked = parse(own, ["width=3", "--cluster", "local", "epochs=2", "--seeds", "1", "kind=b"])
    assert (asked.overrides, asked.cluster, asked.seeds) == (["width=3", "epochs=2", "kind=b"], "local", 1)


def test_a_grid_and_a_search_have_folders_of_their_own(tmp_path: Path) -> None:
    spec = mask_ratio.SWEEP
    assert planned(spec, tmp_path).path.name == "mask_ratio-smoke"
    assert planned(spec, tmp_path, "data.train_limit=90").path.name == "mask_ratio-smoke-train_limit90"
    assert planned(spec, tmp_path, "--sampler", "grid", "--yes", "data.train_limit=90").path.name == "mask_ratio-smoke-grid-train_limit90"


def test_a_folder_that_began_with_overrides_goes_on(own: SweepSpec, tmp_path: Path) -> None:
    """Version 0.1 and those after it had one folder for all."""
    old = begun(own, tmp_path, ["width=4"])
    assert planned(own, tmp_path, "width=4").path == old.path
    assert planned(own, tmp_path, "--seeds", "2", "kind=a", "width=4", "note=x").path == old.path
    assert planned(own, tmp_path, "width=5").path == tmp_path / "own_rate-smoke-width5"


def test_runs_that_left_the_tables_of_the_usual_folder_are_found_there(own: SweepSpec, tmp_path: Path) -> None:
    begun(own, tmp_path, ["width=4"])
    usual = begun(own, tmp_path, [])
    assert planned(own, tmp_path, "width=4").path == usual.path
    assert planned(own, tmp_path, "width=5").path != usual.path


def test_other_run_ids_of_an_earlier_version_do_not_hide_its_folder(own: SweepSpec, tmp_path: Path) -> None:
    old = begun(own, tmp_path, ["width=4"])
    for path in list((old.path / "trials").iterdir()):
        path.rename(path.with_name("0" * 16))
    assert planned(own, tmp_path, "width=4").path == old.path


def test_a_folder_that_was_named_otherwise_by_an_earlier_version_goes_on(own: SweepSpec, tmp_path: Path) -> None:
    old = begun(own, tmp_path, ["width=4"], "own_rate-smoke-w4")
    assert planned(own, tmp_path, "width=4").path == old.path
    grid = begun(own, tmp_path, ["width=7"], "own_rate-smoke-grid-width7")
    text = (grid.path / "commands.jsonl").read_text()
    (grid.path / "commands.jsonl").write_text(text.replace('"width=7"', '"--sampler", "grid", "width=7"'))
    assert planned(own, tmp_path, "width=7").path == tmp_path / "own_rate-smoke-width7"
    (grid.path / "sweep.json").write_text("{")  # that of another one stops nothing
    assert planned(own, tmp_path, "width=7").path == tmp_path / "own_rate-smoke-width7"
    (old.path / "sweep.json").write_text("{")
    with pytest.raises(ValueError, match=r"w4/sweep\.json: .*: restore it from a copy"):
        planned(own, tmp_path, "width=4")
    other = dataclasses.replace(own, name="own_rate-smoke-other")
    begun(other, tmp_path, ["width=9"])
    assert planned(own, tmp_path, "width=9").path == tmp_path / "own_rate-smoke-width9"
    by_hand = begun(own, tmp_path, ["--name", "own_rate-smoke-x", "width=6"], "own_rate-smoke-x")
    assert planned(own, tmp_path, "width=6").path != by_hand.path


@pytest.mark.parametrize("name", ["", "a/b", "..", ".", ".hidden", "a b", "-x", "a" * 101, "a\nb", "/abs"])
def test_a_name_is_that_of_a_folder(own: SweepSpec, tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"^--name must be the name of a folder, of letters, digits, _, \. and -, at most 100; got "):
        planned(own, tmp_path, f"--name={name}")
    assert not list(tmp_path.iterdir())


def test_a_name_is_not_that_of_another_sweep(own: SweepSpec, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^--name must not be single or hydra, which hold single runs; got single: choose another name$"):
        planned(own, tmp_path, "--name", "single")
    begun(own, tmp_path, [])
    with pytest.raises(
        ValueError, match=r"^--name must be a new folder, or one of mask_ratio at smoke scale; got own_rate-smoke, that of own_rate"
    ):
        planned(mask_ratio.SWEEP, tmp_path, "--name", "own_rate-smoke")
    with pytest.raises(
        ValueError, match=r"own_rate at paper scale; got own_rate-smoke, that of own_rate at smoke scale: choose another name$"
    ):
        planned(own, tmp_path, "--scale", "paper", "--name", "own_rate-smoke")


def test_a_value_of_an_option_is_no_override() -> None:
    words = [
        "python",
        "x.py",
        "--cluster",
        "./a=b.yaml",
        "a=1",
        "--retry-failed",
        "b=2",
        "--runs-dir=c=3",
        "d=4",
        "--yes",
        "data.root=/a b",
    ]
    assert overrides_in(words) == ["a=1", "b=2", "d=4", "data.root=/a b"]
