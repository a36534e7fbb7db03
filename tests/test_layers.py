"""The folders of the product: what `ls` shows, who may import whom, and which modules are named in strings."""

import ast
import importlib.util
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from sweeps.spec.sweep import SweepSpec

ROOT = Path(__file__).resolve().parent.parent
# A package may import those before it.
SWEEPS = ("spec", "state", "search", "report", "execution", "cli", "drill")
# Every module, or thing in one, that the product names in a string, to start it, to import it or to find its data.
NAMED = {
    "cnnjepa.data",
    "cnnjepa.data.check",
    "cnnjepa.data.pack",
    "cnnjepa.methods",
    "cnnjepa.probes",
    "cnnjepa.task",
    "jobs.drill",
    "jobs.export",
    "jobs.file_system",
    "jobs.plain",
    "jobs.plain_run",
    "jobs.preflight",
    "jobs.pretrain",
    "jobs.probe",
    "jobs.resuming.child",
    "jobs.slurm.supervisor",
    "jobs.stage",
    "jobs.staging",
    "slurm",
    "sweeps.cli.api",
    "sweeps.cli.run",
    "sweeps.drill.stage",
    "sweeps.drill.sweep",
    "sweeps.execution.monitor",
    "sweeps.execution.ray_allocation",
    "sweeps.execution.ray_node",
    "sweeps.execution.ray_tune.without_client_server",
    "sweeps.execution.successor",
    "sweeps.execution.worker_main",
    "sweeps.report",
    "sweeps.spec.space",
    "sweeps.spec.sweep",
}


def product() -> list[Path]:
    return [path for folder in ("cnnjepa", "jobs", "sweeps") for path in sorted((ROOT / folder).rglob("*.py"))]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path, known: set[str]) -> set[str]:
    """Modules of the product that a file imports anywhere, in functions and for types too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & known or {node.module}
    return found & known


def graph() -> dict[str, set[str]]:
    files = {module_of(path): path for path in product()}
    return {name: imported(path, set(files)) - {name} for name, path in files.items()}


def cycle(edges: dict[str, set[str]]) -> list[str]:
    """Return the modules of a cycle, an empty list where there is none."""
    done: set[str] = set()

    def below(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        found = next((c for other in sorted(edges.get(name, ())) if (c := below(other, [*path, name]))), [])
        done.add(name)
        return found

    return next((found for name in sorted(edges) if (found := below(name, []))), [])


def upward(edges: dict[str, set[str]]) -> list[str]:
    """Return the imports within sweeps/ of a package that stands later than its own."""

    def level(name: str) -> int:
        part = name.split(".")[1]
        return SWEEPS.index(part) if part in SWEEPS else len(SWEEPS)

    inside = {name: [o for o in others if o.startswith("sweeps.")] for name, others in edges.items() if name.startswith("sweeps.")}
    return [f"{name} imports {other}" for name, others in inside.items() for other in others if level(other) > level(name)]


def test_ls_shows_the_sweeps_and_a_few_folders() -> None:
    shown = [p for p in (ROOT / "sweeps").iterdir() if p.name not in ("__pycache__", "__init__.py", "__main__.py")]
    folders = {p.name for p in shown if p.is_dir()}
    assert folders == set(SWEEPS)
    for path in shown:
        if path.is_dir():
            continue
        spec = importlib.util.spec_from_file_location(f"shown_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert isinstance(module.SWEEP, SweepSpec), f"{path.name} must be a sweep"


def test_no_package_is_deeper_than_one_level() -> None:
    assert [p for p in product() if len(p.relative_to(ROOT).parts) > 3] == []


def test_no_import_goes_up_and_none_goes_round() -> None:
    edges = graph()
    assert len(edges) > 100
    assert cycle(edges) == []
    assert upward(edges) == []


def test_an_upward_import_and_a_cycle_are_seen() -> None:
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    edges = {"sweeps.state.folder": {"sweeps.report.tables", "sweeps.spec.sweep"}, "sweeps.spec.sweep": {"jobs.run"}}
    assert upward(edges) == ["sweeps.state.folder imports sweeps.report.tables"]


def strings(path: Path) -> Iterator[str]:
    """The strings of a Python file less its docstrings; the whole text of another."""
    if path.suffix != ".py":
        yield path.read_text()
        return
    tree = ast.parse(path.read_text())
    prose = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.value


def named(files: list[Path]) -> set[str]:
    pattern = re.compile(r"(?<![\w./-])(?:cnnjepa|jobs|sweeps)(?:\.[a-z_]\w*)+")
    return {name for path in files for text in strings(path) for name in pattern.findall(text)}


def is_there(name: str) -> bool:
    """Whether it is a module, or something in one."""
    package, _, last = name.rpartition(".")
    if not package:
        return importlib.util.find_spec(name) is not None
    if importlib.util.find_spec(package).submodule_search_locations is not None:  # type: ignore[union-attr]
        return importlib.util.find_spec(name) is not None
    return hasattr(importlib.import_module(package), last)


def test_every_module_that_is_named_in_a_string_is_there() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    data = settings["tool"]["setuptools"]["package-data"]
    for package, patterns in data.items():
        folder = ROOT / package.replace(".", "/")
        assert all(list(folder.glob(pattern)) for pattern in patterns), f"no data of {package}"
    found = named([*product(), *(ROOT / "slurm").rglob("*.*")]) | set(data)
    assert found == NAMED
    assert [name for name in sorted(found) if not is_there(name)] == []


def test_a_module_that_is_named_in_a_string_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "some.py"
    path.write_text('"""sweeps.prose is not named."""\nline = ["-m", "sweeps.execution.gone"]\nother = f"python -m jobs.{line}"\n')
    assert named([path]) == {"sweeps.execution.gone"}
    assert not is_there("sweeps.execution.gone")
    assert not is_there("sweeps.execution.ray_tune.gone")


@pytest.mark.parametrize("template", sorted(p.name for p in (ROOT / "slurm").glob("*.sbatch")))
def test_a_batch_template_names_modules(template: str) -> None:
    assert named([ROOT / "slurm" / template]) <= NAMED
