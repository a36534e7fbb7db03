"""The files of a user's program: which they are, what of them counts, and their copy beside a sweep."""

import dataclasses
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from jobs import program
from tests.support.documented import ROOT
from tests.support.killed_run import configured, loaded

_TASK = """
import dataclasses
from sweeps import Configuration, PlainTask, SweepSpec, main
import near_by
from pack.inner import deep

@dataclasses.dataclass
class Config:
    lr: float = 0.1
    epochs: int = 2
    seed: int = 42

def train(config, run):
    import late_one
    run.report(1, loss=near_by.VALUE)

TASK = PlainTask(Config, train, objective="loss", files=["table.csv", "conf"])
SWEEP = SweepSpec(configurations=[Configuration({"lr": 0.1})], task=TASK)
"""


@pytest.fixture
def name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a task with files in `tmp_path`."""
    for module in ("some_program", "near_by", "late_one", "pack", "pack.inner", "pack.inner.deep"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "pack" / "inner").mkdir(parents=True)
    for file, text in {
        "some_program.py": _TASK,
        "near_by.py": "VALUE = 1.0\n",
        "late_one.py": "import near_by\n",
        "not_imported.py": "",
        "pack/__init__.py": "",
        "pack/inner/__init__.py": "from . import deep\n",
        "pack/inner/deep.py": "from ..other import x\n",
        "pack/other.py": "x = 1\n",
        "table.csv": "1,2\n",
    }.items():
        (tmp_path / file).write_text(text)
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "a.yaml").write_text("a: 1\n")
    spec, _ = configured(loaded(tmp_path / "some_program.py").SWEEP)
    return spec.task_name


def test_a_program_is_its_file_what_that_imports_from_its_folder_and_what_is_named(name: str, tmp_path: Path) -> None:
    found = program.find(name)
    assert found is not None
    assert (found.module, found.root) == ("some_program", str(tmp_path))
    assert sorted(found.files) == [
        "conf/a.yaml",
        "late_one.py",
        "near_by.py",
        "pack/__init__.py",
        "pack/inner/__init__.py",
        "pack/inner/deep.py",
        "pack/other.py",
        "some_program.py",
        "table.csv",
    ]
    assert program.find("cnnjepa.task") is None


def test_each_file_of_a_program_is_read_once_to_tell_it_from_others(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: Counter[str] = Counter()
    read = Path.read_bytes

    def counted(path: Path) -> bytes:
        reads[path.name] += 1
        return read(path)

    root = program.folder_of(name)
    monkeypatch.setattr(Path, "read_bytes", counted)
    found = program.listed("some_program", root, [root / "some_program.py", root / "table.csv"])
    assert sorted(found.files) == ["some_program.py", "table.csv"]
    assert reads == {"some_program.py": 1, "table.csv": 1}


def test_comments_and_the_sweep_are_no_other_program_and_all_else_is(name: str, tmp_path: Path) -> None:
    before = program.find(name)
    assert before is not None
    file = tmp_path / "some_program.py"
    other_sweep = _TASK.replace('{"lr": 0.1}', '{"lr": 0.5}')
    file.write_text(f"# said\n{other_sweep}\nif __name__ == '__main__':\n    main(SWEEP)\n")
    same = program.find(name)
    assert same is not None
    assert (same.digest == before.digest, same.copy == before.copy) == (True, False)
    file.write_text(_TASK.replace("lr: float = 0.1", "lr: float = 0.2"))
    (tmp_path / "table.csv").write_text("1,3\n")
    other = program.find(name)
    assert other is not None
    assert other.digest != before.digest
    assert other.changed_from(before) == ["some_program.py", "table.csv"]
    (tmp_path / "late_one.py").unlink()
    fewer = program.find(name)
    assert fewer is not None
    assert fewer.changed_from(other) == ["late_one.py"]


@pytest.mark.slow
def test_another_process_loads_the_copy_wherever_the_program_has_gone(name: str, tmp_path: Path) -> None:
    found = program.find(name)
    assert found is not None
    sweep = tmp_path / "sweep"
    program.keep(sweep, found)
    program.keep(sweep, found)  # the same files, once
    for path in tmp_path.glob("*.py"):
        path.unlink()
    code = f"""
from pathlib import Path
from jobs import program
from jobs.task import task_named
program.use(Path({str(sweep)!r}))
task = task_named({name!r})
print(task.OBJECTIVE, task.Config().lr, program.find({name!r}).copy)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd="/", env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["loss", "0.1", found.copy], done.stderr
    assert [p.name for p in (sweep / "program").iterdir()] == [found.copy]


def test_what_a_run_began_with_is_noted_by_attempt(name: str, tmp_path: Path) -> None:
    found = program.find(name)
    assert found is not None
    assert program.noted(tmp_path) is None
    program.note(tmp_path, 1, found)
    program.note(tmp_path, 2, dataclasses.replace(found, copy="other"))
    noted = program.noted(tmp_path)
    assert noted is not None
    assert noted.copy == "other"


def test_a_file_that_is_not_there_or_elsewhere_and_one_too_large_are_one_line(name: str, tmp_path: Path) -> None:
    for wrong in ("gone.csv", "../up.csv"):
        with pytest.raises(ValueError, match=r"^files must be below the folder of the program, .*; got "):
            list(program.files_among([wrong], tmp_path))
    with open(tmp_path / "table.csv", "wb") as file:
        file.truncate(101 * 2**20)
    with pytest.raises(ValueError, match=r"^the files of some_program must take at most 100 MiB, .*; got 101 MiB, most of it .*table\.csv"):
        program.find(name)
