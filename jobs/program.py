"""The files of a task that is no part of this project: find them, copy them beside a sweep, load the copy.

`program.json` in a sweep's folder names the task's module, its files with their checksums, and the
copy in `program/<digest>/` from which every process of the sweep loads it. A run keeps the list of
the files with which each attempt at it began, `program.N.json`.
"""

import ast
import functools
import hashlib
import os
import shutil
import sys
import tempfile
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cnnjepa.run import identity
from cnnjepa.run.attempts import attempts_with, numbered
from cnnjepa.run.files import read_json, reading, sealed_json, write_atomic
from cnnjepa.run.typed import build

_NAME, _COPIES = "program.json", "program"
_PROJECT = ("cnnjepa", "jobs", "sweeps")  # modules of this project are in its own copy: jobs/snapshot.py
_MOST_BYTES = 100 * 2**20


@dataclass(frozen=True)
class Program:
    """The files of a task with the checksum of each, as paths below its root, or whole ones of those elsewhere."""

    module: str
    files: dict[str, str]  # of Python, a checksum of what it means: see `meaning`
    root: str  # the folder that they were found in
    copy: str  # 12 hex digits that identify their bytes
    # Digests of earlier programs whose runs a person keeps beside those of this one.
    kept: list[str] = field(default_factory=list)

    @functools.cached_property
    def digest(self) -> str:
        """Return 12 hex digits that identify what the files mean."""
        return _digest(f"{name} {of}" for name, of in sorted(self.files.items()))

    def changed_from(self, earlier: "Program") -> list[str]:
        """Return the files that were added, removed or changed since `earlier`."""
        return sorted(name for name in self.files.keys() | earlier.files.keys() if self.files.get(name) != earlier.files.get(name))


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def meaning(path: Path, data: bytes) -> bytes:
    """Return what of a file's `data` a run depends on: all, of Python without comments, layout and the sweeps that it describes."""
    if path.suffix != ".py":
        return data
    try:
        tree = ast.parse(data)
    except (SyntaxError, ValueError):
        return data
    tree.body = [node for node in tree.body if not _is_about_a_sweep(node)]
    return ast.dump(tree).encode()


def _is_about_a_sweep(node: ast.stmt) -> bool:
    """Return whether a statement only says what to sweep, so that another configuration is no other program."""
    if isinstance(node, ast.If):
        return ast.unparse(node.test) == "__name__ == '__main__'"
    calls = [n.func for n in ast.walk(node) if isinstance(n, ast.Call)] if isinstance(node, (ast.Assign, ast.AnnAssign)) else []
    return any((f.id if isinstance(f, ast.Name) else f.attr if isinstance(f, ast.Attribute) else "") == "SweepSpec" for f in calls)


def holder_of(*found: Any) -> tuple[str, str, str]:
    """Return module, name and file under which a program holds the first of `found` that it holds at the top of a module.

    Raise ValueError if no module holds any of them.
    """
    for thing in found:
        own = getattr(getattr(thing, "_train", None), "__module__", "__main__")
        modules = [m for m in list(sys.modules.values()) if isinstance(m, types.ModuleType) and is_foreign(m.__name__)]
        held = [(m, name) for m in modules for name, value in list(vars(m).items()) if value is thing]
        for module, name in sorted(held, key=lambda pair: (pair[0].__name__ != own, pair[0].__name__ != "__main__", pair[0].__name__)):
            if file := getattr(module, "__file__", None):
                return _name_of(module), name, os.path.abspath(file)
    rule = "stand at the top of a file, as TASK = PlainTask(...) or SWEEP = SweepSpec(...)"
    raise ValueError(f"a task must {rule}; got one that no imported file holds: in a notebook, import it from a file")


def _name_of(module: types.ModuleType) -> str:
    if module.__name__ != "__main__":
        return module.__name__
    if (spec := getattr(module, "__spec__", None)) is not None:  # python -m
        return str(spec.name)
    name = Path(str(module.__file__)).stem
    if not name.isidentifier():
        raise ValueError(f"a sweep's file must be named like a Python module, with letters, digits and _; got {name}.py")
    return name


def is_foreign(task: str) -> bool:
    """Return whether a task is no part of this project."""
    return task.partition(":")[0].partition(".")[0] not in _PROJECT


def find(task: str) -> Program | None:
    """Return the files of a task as they are now, None for one of this project; raise ValueError if they are too large."""
    if not is_foreign(task):
        return None
    module, owner, root = task.partition(":")[0], identity.task_module(task), folder_of(task)
    files = with_imports(Path(identity.file_of(module)), root)
    for path, base in owner.program_words(root) if hasattr(owner, "program_words") else ():
        files += with_imports(path, base)
    return listed(module, root, [*files, *files_among(getattr(owner, "FILES", ()), root)])


def folder_of(task: str) -> Path:
    """Return the folder that the files of a task are relative to: that of its module, or the one above its package."""
    module = task.partition(":")[0]
    file = Path(identity.file_of(module))
    return file.parents[module.count(".") + (file.name == "__init__.py")]


def listed(module: str, root: Path, files: Sequence[Path]) -> Program:
    """Return the program of these files; raise ValueError if they are too large to be copied."""
    files = list(dict.fromkeys(files))
    size = sum(path.stat().st_size for path in files)
    if size > _MOST_BYTES:
        largest = max(files, key=lambda path: path.stat().st_size)
        rule = f"take at most {_MOST_BYTES >> 20} MiB, since they are copied beside each sweep"
        raise ValueError(f"the files of {module} must {rule}; got {size >> 20} MiB, most of it {largest}: read data from where they are")
    named = {(path.relative_to(root) if path.is_relative_to(root) else path).as_posix(): path for path in files}
    lines, found = [], {}
    for name, path in sorted(named.items()):
        data = path.read_bytes()
        lines.append(f"{name} {hashlib.sha256(data).hexdigest()}")
        found[name] = hashlib.sha256(meaning(path, data)).hexdigest()[:16]
    return Program(module, found, str(root), _digest(lines))


def files_among(names: Sequence[str], root: Path) -> Iterator[Path]:
    """Yield the files that a user has named, of folders all below them; raise ValueError at one that is not below `root`."""
    for name in names:
        path = Path(os.path.normpath(root / name))
        if not path.is_relative_to(root) or not path.exists():
            raise ValueError(f"files must be below the folder of the program, {root}; got {name}")
        yield from [p for p in sorted(path.rglob("*")) if p.is_file() and "__pycache__" not in p.parts] if path.is_dir() else [path]


def with_imports(file: Path, root: Path) -> list[Path]:
    """Return a Python file and what it imports from below `root`, wherever in its text."""
    found: dict[Path, None] = {file: None}
    waiting = [file]
    while waiting:
        path = waiting.pop()
        if path.suffix != ".py":
            continue
        for name in imported(path, root):
            for near in modules_of(name, root):
                if near not in found:
                    found[near] = None
                    waiting.append(near)
    return list(found)


def modules_of(name: str, root: Path) -> Iterator[Path]:
    """Yield the files below `root` that an import of `name` runs: those of its packages, and its own."""
    parts = name.split(".")
    if parts[0] in _PROJECT:
        return
    for end in range(1, len(parts) + 1):
        place = root.joinpath(*parts[:end])
        yield from [path for path in (place / "__init__.py", place.with_suffix(".py")) if path.is_file()]


def imported(path: Path, root: Path) -> Iterator[str]:
    """Yield the dotted names that a file below `root` imports, and those that it may take out of a package."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    package = path.relative_to(root).parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            if base:
                yield base
            yield from (f"{base}.{alias.name}".lstrip(".") for alias in node.names if alias.name != "*")


def read(folder: Path) -> Program | None:
    """Return the program that a sweep's folder names, or None; raise ValueError if the file is damaged."""
    path = folder / _NAME
    if not path.exists():
        return None
    with reading(path):
        return build(Program, read_json(path))


def use(folder: Path) -> None:
    """Let this process load the task of a sweep from the copy in its folder, unless it knows a file of the task.

    A command that was given the sweep's own file keeps to that: it compares the file with the copy.
    """
    program = read(folder)
    if program is not None and not identity.is_placed(program.module) and (file := _file_in(program, copy_in(folder, program))) is not None:
        identity.load_from(program.module, str(file))


def _file_in(program: Program, root: Path) -> Path | None:
    base = root.joinpath(*program.module.split("."))
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


def is_copy(file: str | None) -> bool:
    """Return whether a file is a sweep's own copy of one."""
    return file is not None and any(above.parent.name == _COPIES and (above.parents[1] / _NAME).is_file() for above in Path(file).parents)


def copy_in(folder: Path, program: Program) -> Path:
    """Return where a sweep's folder has the copy of a program."""
    return folder / _COPIES / program.copy


def keep(folder: Path, program: Program) -> None:
    """Copy the files of a program into a sweep's folder, whole or not at all, and name it as the sweep's."""
    copy_whole(copy_in(folder, program), {name: Path(program.root) / name for name in program.files if not os.path.isabs(name)})
    known = read(folder)
    if known is None or (known.module, known.copy, known.kept) != (program.module, program.copy, program.kept):
        write_atomic(folder / _NAME, sealed_json(asdict(program)))


def copy_whole(target: Path, files: Mapping[str, Path], **texts: str) -> None:
    """Copy files, by their paths in `target`, into that folder: whole or not at all, and once; `texts` are further files."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=".", suffix=".tmp", dir=target.parent))
    for name, path in files.items():
        (beside / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, beside / name)
    for name, text in texts.items():
        (beside / name).write_text(text)
    beside.chmod(0o755)
    try:
        os.rename(beside, target)
    except OSError:
        shutil.rmtree(beside)  # another command was first; the content is the same
        if not target.exists():
            raise


def note(run: Path, attempt: int, program: Program) -> None:
    """Note with which files an attempt at a run began."""
    write_atomic(numbered(run / _NAME, attempt), sealed_json(asdict(program)))


def noted(run: Path) -> Program | None:
    """Return the files with which the newest attempt at a run began, or None."""
    for path in [*(numbered(run / _NAME, n) for n in attempts_with(run / _NAME)), run / _NAME]:
        if path.exists():
            with reading(path):
                return build(Program, read_json(path))
    return None
