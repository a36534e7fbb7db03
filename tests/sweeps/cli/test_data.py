"""A sweep on the user's own images: identified once when it is planned, and never continued on other ones."""

import dataclasses
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from cnnjepa.data import fingerprint as module
from cnnjepa.run.folder import RunResult, RunStatus
from cnnjepa.run.identity import from_dict
from jobs.plain import PlainTask
from jobs.planned import must_hold, not_recorded
from sweeps.cli.data import PlannedData
from sweeps.cli.plan import parse, plan
from sweeps.cli.run import run
from sweeps.spec.space import choice
from sweeps.spec.sweep import Configuration, SweepSpec
from sweeps.state.folder import Sweep
from sweeps.state.view import View
from tests.support.images import image_tree, picture
from tests.support.tiny_search import SWEEP as SEARCH
from tests.support.tiny_sweep import sweep

OWN = [
    "data.image_size=32",
    "data.train_limit=0",
    "data.test_limit=0",
    "global_batch_size=8",
    "micro_batch_size=8",
    "data.holdout_fraction=0.25",
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return image_tree(tmp_path / "tree", ["cat", "dog"], images=20)


def spec_of(spec: SweepSpec, *more: str) -> SweepSpec:
    """The sweep with a scale that has the keys of a small image folder."""
    kept = [o for o in spec.smoke.overrides if o.partition("=")[0] not in {k.partition("=")[0] for k in OWN}]
    return dataclasses.replace(spec, smoke=dataclasses.replace(spec.smoke, overrides=[*kept, *OWN, *more]))


def planned(spec: SweepSpec, tree: Path, tmp_path: Path, *more: str, name: str = "imagefolder") -> tuple[Sweep, PlannedData]:
    asked = parse(spec, ["--runs-dir", str(tmp_path / "runs"), f"data={name}", f"data.root={tree}", *more])
    data = PlannedData(asked)
    return plan(spec, asked, data)[0], data


def test_all_trials_share_one_fingerprint_that_is_computed_once(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    known = module.fingerprint
    monkeypatch.setattr(module, "fingerprint", lambda *a, **k: looks.append(1) or known(*a, **k))
    made, _ = planned(spec_of(sweep()), tree, tmp_path)
    assert len(looks) == 1
    assert len({t.values["data"]["fingerprint"] for t in made.trials}) == 1
    assert made.trials[0].values["data"]["fingerprint"].startswith("40 training and 40 test images, listing ")
    moved = tree.rename(tmp_path / "elsewhere")
    assert [t.signature for t in planned(spec_of(sweep()), moved, tmp_path)[0].trials] == [t.signature for t in made.trials]


@pytest.mark.parametrize("kind", ["configurations", "search"])
def test_a_sweep_whose_images_have_changed_is_refused_until_all_may_run_again(kind: str, tree: Path, tmp_path: Path) -> None:
    spec = spec_of(sweep() if kind == "configurations" else SEARCH)
    first, _ = planned(spec, tree, tmp_path)
    first.write()
    assert planned(spec, tree, tmp_path)[1].lines == []
    picture().save(tree / "val" / "cat" / "new.jpg")
    with pytest.raises(
        ValueError, match=r"data\.root must hold the images that the sweep in .* began with, 40 training and 40 test"
    ) as error:
        planned(spec, tree, tmp_path)
    assert "; got 40 training and 41 test images, listing" in str(error.value)
    assert "--start-again" in str(error.value)
    again, data = planned(spec, tree, tmp_path, "--start-again")
    assert data.lines[0].startswith("all trials run on 40 training and 41 test images")
    assert {t.signature for t in again.trials}.isdisjoint(t.signature for t in first.trials)
    again.write()
    assert planned(spec, tree, tmp_path)[0].trials[0].signature == again.trials[0].signature


@dataclasses.dataclass
class Config:
    """A trainer whose data are no images."""

    lr: float = 0.1
    epochs: int = 1
    seed: int = 42


_held = ["3 rows, kind one"]


def _data(config: Config) -> str:
    if not _held:
        raise ValueError("table.csv must be there; got none")
    return _held[-1]


TASK = PlainTask(Config, lambda config, run: None, objective="loss", data=_data)


def test_the_changed_data_of_another_trainer_are_called_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    spec = SweepSpec(name="own", configurations=[Configuration({"lr": 0.1})], task=TASK).resolved()
    asked = parse(spec, ["--runs-dir", str(tmp_path)])
    plan(spec, asked, PlannedData(asked))[0].write()
    monkeypatch.setattr(sys.modules[__name__], "_held", ["4 rows, sort two"])
    with pytest.raises(
        ValueError, match=r"_fingerprint must hold the data that the sweep in .* began with, 3 rows, .*: restore them to"
    ) as error:
        plan(spec, asked, PlannedData(asked))
    assert "image" not in str(error.value)
    monkeypatch.setattr(sys.modules[__name__], "_held", [])
    assert run(spec, ["--runs-dir", str(tmp_path), "--dry-run"]) == 0
    assert "since they depend on the data: table.csv must be there" in capsys.readouterr().out
    config = from_dict({"task": spec.task_name})
    assert not_recorded(config) == "data that were not recorded"
    assert "must hold the data that it began with, which were not recorded; got now" in must_hold(config, "it", "", "now")


def test_a_sweep_of_version_0_1_starts_again_and_says_so(tree: Path, tmp_path: Path) -> None:
    spec = spec_of(sweep())
    asked = parse(spec, ["--runs-dir", str(tmp_path / "runs"), "data=imagefolder", f"data.root={tree}"])
    data = PlannedData(asked)
    data.identified = lambda configs: configs  # type: ignore[method-assign]  # as 0.1 planned
    old, _ = plan(spec, asked, data)
    old.write()
    run_folder = old.run(old.trials[0])
    run_folder.prepare(old.trials[0].config)
    run_folder.write_result(RunResult(RunStatus.completed, metrics={"linear.holdout_top1": 50.0}))
    again, found = planned(spec, tree, tmp_path)
    assert found.lines[0].endswith("before on images that version 0.1 did not record")
    assert again.trials[0].signature != old.trials[0].signature
    shown = View(Sweep.load(old.path))
    assert shown.result(old.trials[0]) is not None  # as before


def test_a_dry_run_without_the_images_prints_everything_but_the_run_ids(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec, words = spec_of(sweep()), ["--runs-dir", str(tmp_path / "runs"), "data=imagefolder", f"data.root={tree}"]
    assert run(spec, [*words, "--dry-run"]) == 0
    here = capsys.readouterr().out
    shutil.rmtree(tree)
    assert run(spec, [*words, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "the run IDs are not known here, since they depend on the images: data.root must hold imagefolder as train/" in out
    assert out.count("?" * 16) == 6
    assert [line[16:] for line in here.splitlines() if "seed" in line] == [line[16:] for line in out.splitlines() if "seed" in line]
    with pytest.raises(ValueError, match=r"data\.root must hold imagefolder"):
        run(spec, words)
    assert not (tmp_path / "runs" / "tiny_sweep-smoke").exists()


def test_a_search_does_not_choose_the_images(tree: Path, tmp_path: Path) -> None:
    spec = dataclasses.replace(SEARCH, space=[*SEARCH.space, choice("data.root", "", str(tree))])
    with pytest.raises(ValueError, match=r"a search must not choose the data, .*; got data\.root: use configurations"):
        plan(spec_of(spec), parse(spec_of(spec), ["--runs-dir", str(tmp_path / "runs"), "data=imagefolder"]))


@pytest.mark.parametrize(("chosen", "given"), [("encoder.weights", []), ("encoder.width", ["encoder.weights=/w.pt"])])
def test_a_search_does_not_choose_weights_nor_the_encoder_that_starts_from_them(chosen: str, given: list[str], tmp_path: Path) -> None:
    """Read once when it is planned, they are the same for all of its runs."""
    values = ("", "b.pt") if chosen == "encoder.weights" else (8, 16)
    spec = dataclasses.replace(SEARCH, space=[*SEARCH.space, choice(chosen, *values)])
    with pytest.raises(ValueError, match=rf"a search must choose neither weights nor the encoder .*; got {chosen}: use configurations"):
        plan(spec, parse(spec, ["--runs-dir", str(tmp_path / "runs"), *given]))


@pytest.mark.parametrize(
    ("objective", "more", "refused"),
    [
        ("", (), "got linear.holdout_top1: use linear.NAME.holdout_top1 with probes.data"),
        ("knn.test_top1", (), "got knn.test_top1"),
        ("collapse.rankme", (), ""),
        ("linear.digits.holdout_top1", ("probes.data=[digits]",), ""),
    ],
)
def test_a_sweep_on_images_without_labels_is_ranked_by_what_its_runs_have(
    objective: str, more: tuple[str, ...], refused: str, tree: Path, tmp_path: Path
) -> None:
    spec = dataclasses.replace(spec_of(sweep(), *more), objective=objective)
    if refused:
        with pytest.raises(ValueError, match="a sweep's objective must be a score that needs no labels") as error:
            planned(spec, tree, tmp_path, name="images")
        assert refused in str(error.value)
        return
    made, data = planned(spec, tree, tmp_path, name="images")
    where = "they run on probes.data" if more else "probes.data=[NAME:ROOT] names a set with labels for them"
    assert data.lines[-1] == f"data=images has no labels, and linear and knn need some: {where}"
    assert made.trials[0].values["data"]["fingerprint"].startswith("40 training images")
