import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.mutants import ROOT, Mutant, read

_SUM = """def added(a: int, b: int) -> int:
    return a + b


def doubled(a: int) -> int:
    return 2 * a


def down(a: int) -> int:
    while a > 0:
        a -= 1
    return a
"""
_TESTS = """from toy.sums import added, down


def test_sum():
    assert added(2, 3) == 5


def test_down():
    assert down(2) == 0
"""
_CLASHES = """import os
import subprocess
import sys
from pathlib import Path

import toy.sums


def test_the_copy_is_what_is_imported():
    assert Path(toy.sums.__file__).is_relative_to(Path.cwd())
    code = "import toy.sums; print(toy.sums.__file__)"
    said = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=True).stdout
    assert Path(said.strip()).is_relative_to(Path.cwd())
    assert toy.sums.added(1, 1) == 2
"""


def entry(name: str, old: str, new: str, *tests: str) -> str:
    return f"[[mutant]]\nname = {name!r}\nfile = 'toy/sums.py'\nold = '''{old}'''\nnew = '''{new}'''\ntests = {json.dumps(tests)}\n"


def toy(folder: Path, *entries: str) -> Path:
    files = {"toy/__init__.py": "", "toy/sums.py": _SUM, "tests/test_sums.py": _TESTS, "tests/test_copy.py": _CLASHES}
    files |= {"tests/test_red.py": "def test_red():\n    assert not 1\n", "tests/mutants.toml": "\n".join(['preload = ["csv"]', *entries])}
    files |= {"pyproject.toml": '[tool.pytest.ini_options]\naddopts = "--import-mode=importlib"\npythonpath = ["."]\n'}
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def hunted(root: Path, *options: str) -> tuple[int, dict[str, Any]]:
    line = [sys.executable, str(ROOT / "tests/mutants.py"), "--root", str(root), "--json", *options]
    env = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # they take longer to load than the toy's tests to run
    done = subprocess.run(line, cwd=root, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def running(path: Path) -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["cmdline"]) if str(path) in " ".join(p.info["cmdline"] or [])]


@pytest.mark.slow
def test_a_bug_is_caught_only_by_a_test_that_fails_because_of_it(tmp_path: Path) -> None:
    sums = "tests/test_sums.py"
    entries = [
        entry("minus", "a + b", "a - b", sums),
        entry("minus, in a copy of its own", "a + b", "a - b", "tests/test_copy.py"),
        entry("another text of the same length", "a + b", "a * b", f"{sums}::test_sum"),
        entry("nobody looks", "2 * a", "3 * a", sums),
        entry("another test", "a + b", "a - b", f"{sums}::test_down"),
        entry("endless", "        a -= 1", "        a -= 0", sums),
        entry("gone", "a / b", "a - b", sums),
        entry("not alone", "int) -> int", "float) -> int", sums),
        entry("no change", "a + b", "a + b", sums),
        entry("no Python", "return 2 * a", "return (2 * a", sums),
        entry("red without it", "a + b", "a - b", "tests/test_red.py"),
        entry("no such test", "a + b", "a - b", "tests/test_gone.py::test_gone"),
    ]
    status, said = hunted(toy(tmp_path / "root", *entries), "--patience", "4")
    verdicts = {name: what for name, (what, _) in said["figures"]["verdicts"].items()}
    assert re.fullmatch(r"caught: still running after \d+ s", verdicts.pop("endless"))
    assert verdicts == {
        "minus": "caught",
        "minus, in a copy of its own": "caught",
        "another text of the same length": "caught",
        "nobody looks": "survived",
        "another test": "survived",
        "gone": "does not apply: its text occurs 0 times in toy/sums.py",
        "not alone": "does not apply: its text occurs 3 times in toy/sums.py",
        "no change": "does not apply: its text occurs 1 times in toy/sums.py",
        "no Python": "error: a file of tests cannot be imported",
        "red without it": "error: without it tests/test_red.py fails",
        "no such test": "error: without it tests/test_gone.py fails",
    }
    assert status == 1
    assert (said["n"], said["figures"]["caught"]) == (12, 4)
    assert len(said["figures"]["failures"]) == 8
    # The user's own files are as they were, and nothing of the endless run is left.
    assert (tmp_path / "root/toy/sums.py").read_text() == _SUM
    assert not [p for p in (tmp_path / "root").rglob("*") if p.name == "__pycache__"]
    assert running(tmp_path) == []


def test_a_list_whose_bugs_are_all_caught_ends_well(tmp_path: Path) -> None:
    sums = "tests/test_sums.py"
    root = toy(tmp_path, entry("minus", "a + b", "a - b", sums), entry("nobody looks", "2 * a", "3 * a", sums))
    status, said = hunted(root, "--only", "minus", "--jobs", "1")
    assert (status, said["n"], said["figures"]["failures"]) == (0, 1, [])
    status, said = hunted(root, "--only", "no bug has this name")
    assert (status, said["n"]) == (1, 0)


def test_ended_in_the_middle_it_leaves_no_process_and_no_copy(tmp_path: Path) -> None:
    root = toy(tmp_path / "root", entry("endless", "        a -= 1", "        a -= 0", "tests/test_sums.py"))
    (tmp_path / "temporary").mkdir()
    line = [sys.executable, str(ROOT / "tests/mutants.py"), "--root", str(root), "--jobs", "1"]
    env = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "TMPDIR": str(tmp_path / "temporary")}
    process = subprocess.Popen(line, env=env, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not any("a -= 0" in copy.read_text() for copy in tmp_path.glob("temporary/*/0/checkout/toy/sums.py")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 143
    assert running(tmp_path) == []
    assert list((tmp_path / "temporary").iterdir()) == []


def test_every_bug_of_the_list_can_be_planted_and_has_tests() -> None:
    _, mutants = read(ROOT)
    assert len({m.name for m in mutants}) == len(mutants)
    assert {m.name: said for m in mutants if (said := m.refusal(ROOT))} == {}
    assert [m.name for m in mutants if not m.tests] == []
    missing = []
    for test in sorted({test for m in mutants for test in m.tests}):
        file, *names = test.split("::")
        text = (ROOT / file).read_text() if (ROOT / file).is_file() else ""
        if not text or not all(re.search(rf"^\s*(def|class) {name.split('[')[0]}\b", text, re.MULTILINE) for name in names):
            missing.append(test)
    assert missing == []


def test_a_text_that_has_gone_or_stands_there_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("one two two")
    said = [Mutant("", file, old, "x", []).refusal(tmp_path) for file, old in [("a.py", "one"), ("a.py", "two"), ("b.py", "one")]]
    assert said == ["", "does not apply: its text occurs 2 times in a.py", "does not apply: its text occurs 0 times in b.py"]
