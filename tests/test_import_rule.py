"""The import rule of the architecture, read off the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = {"cnnjepa": set(), "jobs": {"cnnjepa"}, "sweeps": {"jobs", "cnnjepa"}}
# Commands of jobs/ that start what is in sweeps/.
ENTRIES = ("jobs/drill.py",)
# Where a framework may be imported: a file, or every file below a folder.
ALLOWED = {
    "submitit": ("jobs/",),
    "optuna": ("sweeps/search/sampler.py", "sweeps/report/optuna_study.py", "sweeps/report/search_figures.py"),
    "ray": ("sweeps/execution/",),
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
