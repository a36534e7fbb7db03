"""A sweep is found by its file, in any folder, or by the name that a package offers; what is none is one line."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sweeps import SweepSpec
from sweeps.cli import sweep_file
from tests.support.wheel import offer

SPEC = """
from sweeps import Configuration, Scale, SweepSpec
{name} = SweepSpec(name="mine", question="?", configurations=[Configuration({{"epochs": 1}})], smoke=Scale([], 1), paper=Scale([], 1))
"""


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No path and no module of one test is there in the next."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    known = set(sys.modules)
    yield
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(("/tmp", os.environ.get("TMPDIR", "/tmp"))):
            del sys.modules[name]


@pytest.mark.parametrize("name", ["SWEEP", "any_other"])
@pytest.mark.parametrize("file", ["my_sweep_file.py", "not-a-name.py", "random.py"])
def test_a_file_is_read_as_its_folder_would(name: str, file: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text("import beside_it\n" + SPEC.format(name=name))
    (tmp_path / "beside_it.py").write_text("")
    found = sweep_file.spec_of(str(tmp_path / file))
    assert isinstance(found, SweepSpec)
    assert found.name == "mine"
    assert sweep_file.spec_of(str(tmp_path / file)) == found, "it is imported once"
    assert os.environ["PYTHONPATH"].split(os.pathsep)[0] == str(tmp_path), "for the processes that are started"
    import random

    assert hasattr(random, "gauss")


def test_without_a_name_it_is_called_like_its_file(tmp_path: Path) -> None:
    (tmp_path / "my_question.py").write_text(SPEC.format(name="SWEEP").replace('name="mine", ', ""))
    assert sweep_file.spec_of(str(tmp_path / "my_question.py")).name == "my_question"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, r"FILE must be a file of Python; got \S+bad_sweep\.py: there is no such file"),
        ("x = 1\n", r"must hold one SweepSpec, by the name SWEEP if there are more; got none"),
        (SPEC.format(name="a") + SPEC.format(name="b"), r"by the name SWEEP if there are more; got 2 \(a, b\)"),
        ("def (\n", r"must be a file that can be imported; got SyntaxError"),
        ("\n\nimport no_such_module_of_mine\n", r"got ModuleNotFoundError: No module named 'no_such_module_of_mine' \(line 3\)"),
    ],
)
def test_what_is_no_sweep_is_one_line(text: str | None, says: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "bad_sweep.py").write_text(text)
    with pytest.raises(ValueError, match=says) as said:
        sweep_file.spec_of(str(tmp_path / "bad_sweep.py"))
    assert "\n" not in str(said.value)


def test_a_file_that_is_not_called_like_one_of_python_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text(SPEC.format(name="SWEEP"))
    with pytest.raises(ValueError, match=r"^FILE must be the path of a \.py file; got \S+/mine$"):
        sweep_file.spec_of(str(tmp_path / "mine"))


def test_a_folder_with_a_module_called_like_ours_is_refused(tmp_path: Path) -> None:
    (tmp_path / "jobs.py").write_text("")
    (tmp_path / "my_sweep_file.py").write_text(SPEC.format(name="SWEEP"))
    with pytest.raises(ValueError, match=r"the module jobs must be the one of cnnjepa-sweeps; got \S+/jobs\.py: rename"):
        sweep_file.spec_of(str(tmp_path / "my_sweep_file.py"))


def test_packages_offer_sweeps_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "offered_sweep.py").write_text(SPEC.format(name="SWEEP"))
    offer(tmp_path, "theirs", cnnjepa_sweeps={"offered": "offered_sweep"})
    assert sweep_file.spec_of("offered").name == "mine"
    assert sweep_file.spec_of("predictor_ablation").name == "predictor_ablation"
    with pytest.raises(ValueError, match=r"got predictor_ablatio; did you mean predictor_ablation\?"):
        sweep_file.spec_of("predictor_ablatio")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"got offered_sweep: write offered_sweep\.py"):
        sweep_file.spec_of("offered_sweep")
    offer(tmp_path, "others", cnnjepa_sweeps={"predictor_ablation": "offered_sweep"})
    with pytest.raises(ValueError, match="must have a name of its own; got predictor_ablation = offered_sweep beside sweeps"):
        sweep_file.spec_of("predictor_ablation")
