"""Which files are the user's own, and what of them no commit holds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import own_code, provenance, snapshot
from tests.support.documented import ROOT
from tests.support.wheel import offer


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the user's on sys.path, which nothing has named yet."""
    monkeypatch.setattr(own_code, "_named", {})
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def write(home: Path, **files: str) -> None:
    for name, text in files.items():
        path = home / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_what_a_file_imports_is_found_in_functions_and_packages_too(home: Path) -> None:
    write(home, begin="import torch, os\ndef f():\n    from lib import inner\n    import plain as p\n", plain="import json\n", other="")
    write(home, lib__inner="from .near import x\nfrom .. import far\n", lib__near="import plain\nx = 1\n", lib__never="")
    (home / "lib" / "__init__.py").write_text("")
    write(home, broken="def (\n")
    own_code.name("begin", home / "begin.py")
    assert list(own_code.files()) == ["begin.py", "lib/__init__.py", "lib/inner.py", "lib/near.py", "plain.py"]
    own_code.name("broken", home / "broken.py")
    assert "broken.py" in own_code.files()


@pytest.mark.parametrize("place", ["site-packages", "dist-packages"])
def test_what_is_installed_is_nobodys_own(place: str, home: Path) -> None:
    write(home / place, begin="")
    assert not own_code.is_own(home / place / "begin.py")
    assert not own_code.is_own(Path(json.__file__))
    assert not own_code.is_own(ROOT / "jobs" / "run.py")
    assert not own_code.is_own(home / "missing.py")


def test_a_module_of_a_computed_name_is_seen_once_it_is_imported(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(home, begin="", chosen="")
    own_code.name("begin", home / "begin.py")
    assert list(own_code.files()) == ["begin.py"]
    monkeypatch.setitem(sys.modules, "chosen", type(sys)("chosen"))
    sys.modules["chosen"].__file__ = str(home / "chosen.py")
    assert list(own_code.files()) == ["begin.py", "chosen.py"]


def test_the_snapshot_holds_own_files_where_they_are_imported_from(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "_PARTS", ("pyproject.toml",))
    before = snapshot.digest()
    write(home, lib__begin="x = 1\n")
    own_code.name("lib.begin", home / "lib" / "begin.py")
    assert (first := snapshot.digest()) != before
    code = snapshot.take(home / "code", provenance.commit_and_diff())
    assert (code / "lib" / "begin.py").read_text() == "x = 1\n"
    assert json.loads((code / "code.json").read_text())["own"] == {"lib/begin.py": ""}
    write(home, lib__begin="x = 2\n")
    assert snapshot.digest() not in (first, before)


def git(folder: Path, *words: str) -> None:
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=folder, check=True, capture_output=True, timeout=60)


def test_own_files_are_in_the_diff_unless_a_commit_has_them(home: Path) -> None:
    write(home, begin="import near\n", near="x = 1\n")
    own_code.name("begin", home / "begin.py")
    found = provenance.commit_and_diff()
    assert found["own"] == {"begin.py": "", "near.py": ""}
    assert "+++ b/near.py\n@@ -0,0 +1,1 @@\n+x = 1\n" in found["diff"]
    git(home, "init", "-q")
    git(home, "add", "begin.py")
    git(home, "commit", "-qm", "a")
    found = provenance.commit_and_diff()
    assert len(found["own"]["begin.py"]) == 40
    assert found["own"]["near.py"] == ""
    assert "b/begin.py" not in found["diff"]
    assert "+x = 1" in found["diff"]
    write(home, begin="import near\ny = 2\n")
    assert "+y = 2" in provenance.commit_and_diff()["diff"]


def test_a_diff_that_is_too_long_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "_LONGEST_DIFF", 10)
    assert provenance._bounded("a" * 10) == "a" * 10
    assert provenance._bounded("a" * 12) == "aaaaaaaaaa\n(the first 10 of 12 characters)\n"


def test_a_new_file_of_the_checkout_that_runs_is_no_clean_checkout(tmp_path: Path) -> None:
    """In a checkout whose only change is a sweep that git does not know, as a script and imported."""
    for part in ("cnnjepa/run", "jobs"):
        for path in sorted((ROOT / part).glob("*.py")):
            (tmp_path / part).mkdir(parents=True, exist_ok=True)
            (tmp_path / part / path.name).write_bytes(path.read_bytes())
    (tmp_path / "cnnjepa" / "__init__.py").write_text("")
    (tmp_path / "pyproject.toml").write_text("")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "a")
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "helper.py").write_text("z = 3\n")
    (tmp_path / "sweeps" / "idle.py").write_text("")
    script = "import json\nimport helper\nfrom jobs.provenance import commit_and_diff\nprint(json.dumps(commit_and_diff()))\n"
    (tmp_path / "sweeps" / "mine.py").write_text(script)
    words = [sys.executable, str(tmp_path / "sweeps" / "mine.py")]
    done = subprocess.run(words, env={"PYTHONPATH": str(tmp_path), "HOME": "/"}, capture_output=True, text=True, timeout=60, check=False)
    found = json.loads(done.stdout or "{}") or pytest.fail(done.stderr)
    assert len(found["commit"]) == 40
    assert "+from jobs.provenance import commit_and_diff" in found["diff"]
    assert "+z = 3" in found["diff"]
    assert "idle.py" not in found["diff"], "it takes no part"
    (tmp_path / "new.patch").write_text(found["diff"])
    (tmp_path / "sweeps" / "mine.py").unlink()
    (tmp_path / "sweeps" / "helper.py").unlink()
    git(tmp_path, "apply", "new.patch")
    assert (tmp_path / "sweeps" / "mine.py").read_text() == script


def test_the_command_is_what_a_person_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    main = type(sys)("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "argv", ["/venv/bin/cnnjepa-sweep", "run", "my.py", "token=abc"])
    assert provenance.typed() == ["cnnjepa-sweep", "run", "my.py", "token=***"]
    monkeypatch.setattr(sys, "argv", ["mine/my.py", "--yes"])
    assert provenance.typed() == ["python", "mine/my.py", "--yes"]
    main.__spec__ = type("Spec", (), {"name": "sweeps.__main__"})()
    monkeypatch.setattr(sys, "argv", ["/somewhere/sweeps/__main__.py", "status"])
    assert provenance.typed() == ["python", "-m", "sweeps", "status"]


def test_a_trial_records_its_overrides_and_the_command_it_works_for() -> None:
    with provenance.of_trial(["lr=1", "api_key=x"], ["python", "my.py"]):
        found = provenance.provenance()
    assert (found["overrides"], found["command"]) == (["lr=1", "api_key=***"], ["python", "my.py"])
    with provenance.of_trial(["lr=1"], None):
        assert provenance.provenance()["command"] == provenance.typed()
    assert "overrides" not in provenance.provenance()


def test_a_method_of_another_package_takes_part_once_it_is_imported(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(home, my_method="import part\n", part="")
    offer(home, "mine", cnnjepa_methods={"mine": "my_method"})
    assert own_code.files() == {}
    monkeypatch.setitem(sys.modules, "my_method", type(sys)("my_method"))
    sys.modules["my_method"].__file__ = str(home / "my_method.py")
    assert list(own_code.files()) == ["my_method.py", "part.py"]
