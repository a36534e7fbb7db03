"""The import rule of the architecture, read off the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_layers import named

ROOT = Path(__file__).resolve().parent.parent
LAYERS = {"cnnjepa": set(), "jobs": {"cnnjepa"}, "sweeps": {"jobs", "cnnjepa"}}
# Commands of jobs/ that start what is in sweeps/.
ENTRIES = ("jobs/drill.py",)
# Where a framework may be imported: a file, or every file below a folder.
ALLOWED = {
    "submitit": ("jobs/",),
    "optuna": ("sweeps/search/sampler.py", "sweeps/report/optuna_study.py", "sweeps/report/search_figures.py"),
    "ray": ("sweeps/execution/",),
    "mlflow": ("sweeps/report/export_mlflow.py", "sweeps/cli/export.py"),
    "wandb": ("sweeps/report/export_wandb.py",),
    "hydra": ("jobs/config.py", "jobs/pretrain.py"),
    "omegaconf": ("jobs/config.py", "jobs/pretrain.py"),
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def violations(relative: str, found: set[str]) -> list[str]:
    layer = relative.split("/")[0]
    wrong = [
        f"{relative} imports {other}"
        for other in LAYERS
        if other in found and other != layer and other not in LAYERS[layer] and relative not in ENTRIES
    ]
    return wrong + [f"{relative} imports {lib}" for lib, places in ALLOWED.items() if lib in found and not relative.startswith(places)]


def test_no_file_breaks_the_rule() -> None:
    files = [p for layer in LAYERS for p in (ROOT / layer).rglob("*.py")]
    assert len(files) > 30
    assert [v for p in files for v in violations(p.relative_to(ROOT).as_posix(), imports(p))] == []


@pytest.mark.parametrize(
    ("file", "library"),
    [
        ("cnnjepa/train.py", "jobs"),
        ("jobs/run.py", "sweeps"),
        ("sweeps/execution/worker.py", "optuna"),
        ("cnnjepa/x.py", "ray"),
        ("sweeps/x.py", "submitit"),
    ],
)
def test_the_rule_can_be_broken(file: str, library: str) -> None:
    assert violations(file, {library}) == [f"{file} imports {library}"]


def hidden_by(names: list[str]) -> list[str]:
    """Those of `names` that an interpreter started elsewhere finds as modules of its own or of an installed package."""
    code = "import importlib.util, sys; print(*[n for n in sys.argv[1:] if importlib.util.find_spec(n)])"
    done = subprocess.run([sys.executable, "-P", "-c", code, *names], cwd="/", capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.split()


def test_no_sweep_file_hides_a_library() -> None:
    """Running a script puts sweeps/ first on the path: its files would be found in place of modules of the same name."""
    names = [p.stem for p in (ROOT / "sweeps").glob("*") if p.suffix == ".py" or (p / "__init__.py").exists()]
    assert "predictor_ablation" in names
    assert hidden_by([n for n in names if not n.startswith("__")]) == []
    assert hidden_by(["optuna", "ray", "queue", "no_such_module"]) == ["optuna", "ray", "queue"]


# What launcher and run folder may import or name in a string, by folder. The default task stands in one place, cnnjepa/run/identity.py.
BELOW = {"cnnjepa/run": "cnnjepa.run", "jobs": "cnnjepa.run", "sweeps": "cnnjepa.run"}
# File -> what it may reach beside that, and why. This list can only shrink.
REACHES = {
    ("cnnjepa/run/identity.py", "cnnjepa.task"): "the default task's name, the one place where it stands",
    ("jobs/drill.py", "sweeps"): "a command that people type as jobs.drill; the drill is a sweep",
    ("jobs/preflight.py", "sweeps"): "the job that it asks Slurm to accept is a worker's",
}


def reached(path: Path) -> set[str]:
    """Modules of the product that a file imports or names in a string, with what it takes out of a package."""
    found = named([path])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def across(relative: str, found: set[str]) -> list[str]:
    """What a file reaches over the line between launcher and trainer, as 'file reaches module'."""
    allowed = next((below for folder, below in BELOW.items() if relative.startswith(f"{folder}/")), None)
    wrong = {n for n in found if allowed and n.split(".")[0] == "cnnjepa" and not f"{n}.".startswith(f"{allowed}.")}
    wrong |= {"sweeps" for n in found if relative.startswith("jobs/") and n.split(".")[0] == "sweeps"}
    return sorted(f"{relative} reaches {name}" for name in wrong)


def test_the_launcher_reaches_the_trainer_through_the_run_folder_and_its_task_alone() -> None:
    files = [p for folder in BELOW for p in (ROOT / folder).rglob("*.py")]
    assert len(files) > 60
    found = {line for p in files for line in across(p.relative_to(ROOT).as_posix(), reached(p))}
    assert found == {f"{file} reaches {name}" for file, name in REACHES}


@pytest.mark.parametrize(
    ("file", "line", "reaches"),
    [
        ("sweeps/x.py", "from cnnjepa import task", "cnnjepa.task"),
        ("sweeps/x.py", "import cnnjepa.train", "cnnjepa.train"),
        ("jobs/run.py", "def late():\n    from cnnjepa.data.datasets import load_splits", "cnnjepa.data.datasets.load_splits"),
        ("jobs/x.py", 'line = [python, "-m", "cnnjepa.data.check"]', "cnnjepa.data.check"),
        ("sweeps/drill/x.py", 'importlib.import_module(f"cnnjepa.probes.{name}")', "cnnjepa.probes"),
        ("jobs/x.py", 'CODE = """\nfrom cnnjepa.rules import validate\n"""', "cnnjepa.rules"),
        ("jobs/x.py", 'line = "python -m sweeps.execution.monitor"', "sweeps"),
        ("cnnjepa/run/x.py", "from cnnjepa.config import TrainConfig", "cnnjepa.config.TrainConfig"),
    ],
)
def test_what_reaches_over_the_line_is_seen(file: str, line: str, reaches: str, tmp_path: Path) -> None:
    path = tmp_path / "some.py"
    path.write_text(f"{line}\nfrom cnnjepa.run.folder import RunFolder\n")
    assert across(file, reached(path)) == [f"{file} reaches {reaches}"]
