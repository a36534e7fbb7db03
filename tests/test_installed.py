"""The wheel works outside the checkout: in a folder of the user's, with a profile, a sweep and a method of the user's own."""

import csv
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.documented import ROOT, example
from tests.support.tiny import OVERRIDES
from tests.support.wheel import built, environment, installed, offer, pip, run

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("wheel")]
SWEEP = """
from sweeps import Configuration, Scale, SweepSpec, main
SWEEP = SweepSpec(
    name="mine",
    question="Which learning rate for a method of my own?",
    configurations=[Configuration({"optimizer.lr": 0.001}), Configuration({"optimizer.lr": 0.01})],
    smoke=Scale(["method=own_simsiam", *WORDS], seeds=1),
    paper=Scale([], seeds=1),
    objective="knn.holdout_top1",
)
if __name__ == "__main__":
    main(SWEEP)
"""
_WORDS = [*OVERRIDES, "epochs=2", "probes.names=[knn]"]
PROFILE = "name: desk\nscheduler: local\ncores_per_trial: 1\nmemory_gb_per_trial: 1\nruns_dir: my_runs\n"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def place(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's folder, in a git repository of the user's, below which the wheel is installed."""
    home = tmp_path_factory.mktemp("home")
    installed(wheel, home / "lib")
    write_own(home)
    offer(home, "own-simsiam", cnnjepa_methods={"own_simsiam": "own_simsiam"}, cnnjepa_sweeps={"offered": "my_sweep"})
    for words in (["init", "-q"], ["add", "my_sweep.py"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"]):
        subprocess.run(["git", *words], cwd=home, check=True, timeout=60)
    return home


def write_own(home: Path) -> None:
    """Write a sweep, a method and a profile into the user's folder."""
    (home / "my_sweep.py").write_text(SWEEP.replace("*WORDS", f"*{_WORDS}"))
    (home / "own_simsiam.py").write_text(example("adding-a-method.md", "python").replace("simsiam", "own_simsiam"))
    (home / "desk.yaml").write_text(PROFILE)


def command(home: Path, *words: str) -> tuple[int, str]:
    return run([str(home / "lib" / "bin" / words[0]), *words[1:]], home, environment(home / "lib", home))


def test_the_wheel_holds_every_file_of_its_folders_and_nothing_else(wheel: Path) -> None:
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    parts = [p for part in ("cnnjepa", "jobs", "sweeps", "slurm") for p in (ROOT / part).rglob("*") if p.is_file()]
    assert inside == {p.relative_to(ROOT).as_posix() for p in parts if "__pycache__" not in p.parts}


def test_a_sweep_of_the_users_own_runs_to_its_table_from_the_wheel_alone(place: Path) -> None:
    status, said = command(place, "cnnjepa-sweep", "run", "my_sweep.py", "--cluster", "./desk.yaml")
    assert status == 0, said
    folder = place / "my_runs" / "mine-smoke"
    table = list(csv.DictReader((folder / "results.csv").open()))
    assert [row["state"] for row in table] == ["completed", "completed"]
    (code,) = (folder / "code").iterdir()
    for trial in (folder / "trials").iterdir():
        found = json.loads((trial / "provenance.json").read_text())
        assert found["code"] == str(code), "workers run the snapshot"
        assert found["command"] == ["cnnjepa-sweep", "run", "my_sweep.py", "--cluster", "./desk.yaml"]
        assert found["commit"] == "", "the repository around the installation is not that of this package"
        assert found["packages"]["cnnjepa-sweeps"] == "0.1.0"
        assert {"method=own_simsiam", "seed=42", "epochs=2"} < set(found["overrides"])
        assert set(found["own"]) == {"my_sweep.py", "own_simsiam.py"}
        assert found["own"]["my_sweep.py"]
        assert not found["own"]["own_simsiam.py"]
        assert "+class Method(BaseMethod[Config]):" in found["diff"]
        assert "my_sweep.py" not in found["diff"], "its commit has it"
    assert {"my_sweep.py", "own_simsiam.py", "slurm", "jobs"} <= {p.name for p in code.iterdir()}
    status, said = command(place, "cnnjepa-sweep", "results", "my_runs/mine-smoke", "--format", "csv")
    assert status == 0, said
    assert {"lr 0.001", "lr 0.01"} < {line.partition(",")[0] for line in said.splitlines()}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("cnnjepa-sweep --help", "usage: cnnjepa-sweep"),
        ("cnnjepa-sweep run offered --cluster ./desk.yaml --dry-run", "2 trials, 2 epochs each"),
        ("cnnjepa-sweep run predictor_ablation --cluster komondor --dry-run account=abc", "#SBATCH --account=abc"),
        ("cnnjepa-pretrain -c job -p method method=own_simsiam", "name: own_simsiam"),
        ("cnnjepa-preflight --help", "usage: cnnjepa-preflight"),
        ("cnnjepa-preflight --gpu", "not run: "),
    ],
)
def test_each_command_finds_its_data_and_what_is_the_users_own(words: str, says: str, place: Path) -> None:
    status, said = command(place, *words.split())
    assert status == 0, said
    assert says in said
    assert str(ROOT) not in said.replace(sys.executable, ""), "nothing comes from the checkout, though its interpreter may lie there"


def test_a_package_that_has_overwritten_a_file_of_ours_is_one_line(wheel: Path, tmp_path: Path) -> None:
    lib = installed(wheel, tmp_path / "lib")
    (lib / "jobs" / "cli.py").write_text("x = 1\n")
    tool = [str(lib / "bin" / "cnnjepa-sweep"), "--help"]
    offer(lib, "jobs")
    (lib / "jobs-1.0.dist-info" / "RECORD").write_text("jobs/cli.py,sha256=abc,6\n")
    status, said = run(tool, tmp_path, environment(lib))
    assert (status, said.count("\n")) == (2, 1), said
    assert "jobs/cli.py must be the file of cnnjepa-sweeps; got the file of the package jobs: uninstall it" in said


def others() -> list[str]:
    """The interpreters that the package says it runs on, as far as they are here; this one at least."""
    versions = Path.home() / ".pyenv" / "versions"
    return [sys.executable, *(str(p) for minor in (12, 13) for p in sorted(versions.glob(f"3.{minor}.*/bin/python")))]


_IMPORTS = "import compileall, sys; import cnnjepa.run.console, cnnjepa.run.command_line, cnnjepa.run.identity, jobs.own_code, sweeps"
_COMPILES = "sys.exit(not compileall.compile_dir(sys.argv[1], quiet=1))"


@pytest.mark.parametrize("python", others(), ids=lambda p: Path(p).parts[-3])
def test_it_installs_and_what_needs_no_other_package_imports_on_each_python_here(python: str, wheel: Path, tmp_path: Path) -> None:
    lib = installed(wheel, tmp_path / "lib", python)
    status, said = run([python, "-W", "error", "-c", f"{_IMPORTS}; {_COMPILES}", str(lib)], tmp_path, environment(lib))
    assert status == 0, said


@pytest.mark.nightly
@pytest.mark.timeout(4500)  # several gigabytes are installed
def test_in_a_fresh_environment_a_sweep_of_the_users_own_runs_to_its_table(wheel: Path, tmp_path: Path) -> None:
    """All dependencies are installed from the index, and the user's method as a package of its own."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True, timeout=120)
    python = str(tmp_path / "venv" / "bin" / "python")
    pip(python, "install", "--constraint", str(ROOT / "constraints.txt"), str(wheel), timeout=1800)
    own, home = tmp_path / "own", tmp_path / "empty"
    own.mkdir()
    home.mkdir()
    write_own(home)
    (home / "own_simsiam.py").rename(own / "own_simsiam.py")
    (own / "pyproject.toml").write_text(
        '[project]\nname = "own-simsiam"\nversion = "1.0"\n[project.entry-points.cnnjepa_methods]\nown_simsiam = "own_simsiam"\n'
    )
    pip(python, "install", str(own), timeout=600)
    tool = str(tmp_path / "venv" / "bin" / "cnnjepa-sweep")
    clean = {k: v for k, v in environment().items() if k != "PYTHONPATH"}
    status, said = run([tool, "run", "my_sweep.py", "--cluster", "./desk.yaml"], home, clean, timeout=900)
    assert status == 0, said
    status, said = run([tool, "run", "my_sweep.py", "--cluster", "local", "--seeds", "2"], home, clean, timeout=900)
    assert status == 0, said
    assert "k-NN" in said
