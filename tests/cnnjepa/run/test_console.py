"""A foreign package that hides a part of this one is one line, whichever command or file is started."""

import subprocess
import sys
from pathlib import Path

import pytest

from cnnjepa.run import console
from tests.support.documented import ROOT


def started(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    path = {"PYTHONPATH": f"{folder}:{ROOT}"}
    return subprocess.run([sys.executable, *words], cwd=folder, env=path, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("name", ["jobs", "sweeps"])
@pytest.mark.parametrize("form", ["module", "package"])
def test_a_foreign_module_is_one_line_for_an_installed_command(name: str, form: str, tmp_path: Path) -> None:
    file = tmp_path / f"{name}.py" if form == "module" else tmp_path / name / "__init__.py"
    file.parent.mkdir(exist_ok=True)
    file.write_text("raise RuntimeError('it must not be imported')\n")
    done = started(tmp_path, "-c", "import sys; from cnnjepa.run.console import main; sys.exit(main())")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert f"error: the module {name} must be the one of cnnjepa-sweeps; got {file}: rename or uninstall" in done.stderr


def test_a_script_that_imports_sweeps_beside_a_foreign_jobs_ends_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "jobs.py").write_text("")
    (tmp_path / "mine.py").write_text("from sweeps import SweepSpec\n")
    done = started(tmp_path, "mine.py")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "the module jobs must be the one of cnnjepa-sweeps" in done.stderr
    (tmp_path / "jobs.py").rename(tmp_path / "others.py")
    (tmp_path / "jobs").mkdir()  # a folder of data hides no package
    assert started(tmp_path, "mine.py").returncode == 0


def test_in_a_notebook_it_is_an_import_error(tmp_path: Path) -> None:
    (tmp_path / "jobs.py").write_text("")
    code = "try:\n    import sweeps\nexcept ImportError as error:\n    print(error)\n"
    done = started(tmp_path, "-c", code)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("the module jobs must be the one of cnnjepa-sweeps")


def test_this_checkout_is_no_installation() -> None:
    assert console.foreign() == ""
