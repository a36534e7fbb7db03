"""Find the user's own Python files that take part in a command: its script, what it names, and what these import.

A file is the user's own unless it belongs to this package, to Python, or to an installed package. Its
imports are read off the source, those within functions too. A module that is imported by a computed
name is seen once it has been imported, if it lies in or below the folder of a file of the user's.
"""

import functools
import site
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from cnnjepa.run.console import METHODS, offered
from jobs.program import imported, modules_of

ROOT = Path(__file__).resolve().parent.parent
OURS = ("cnnjepa", "jobs", "sweeps", "slurm")
_PACKAGES = {"site-packages", "dist-packages"}  # parts of the path of what is installed
_named: dict[str, Path] = {}  # module -> file, of what a command has named, beside its script


def name(module: str, file: str | Path | None) -> None:
    """Note that a module of that name takes part, in that file; without effect unless it is the user's own."""
    if file is not None and is_own(path := Path(file).resolve()):
        _named[module] = path


@functools.cache
def _others() -> list[Path]:
    """Return the folders of Python and of what is installed."""
    paths = sysconfig.get_paths()
    found = [paths[key] for key in ("stdlib", "platstdlib", "purelib", "platlib", "scripts")]
    found += [*site.getsitepackages(), site.getusersitepackages()]
    if not (ROOT / "pyproject.toml").exists():
        found.append(str(ROOT))  # `pip install --target` puts others beside this package
    return [Path(p).resolve() for p in found]


def is_own(path: Path) -> bool:
    """Return whether a resolved path is that of a Python file of the user's."""
    if path.suffix != ".py" or _PACKAGES & set(path.parts) or any(path.is_relative_to(p) for p in _others()):
        return False
    return not any(path.is_relative_to(ROOT / part) for part in OURS) and path.is_file()


def files() -> dict[str, Path]:
    """Return the user's own files that take part, by their paths below the folder that is on sys.path.

    Of two files that have the same such path, only the first can be imported.
    """
    found: dict[str, Path] = {}
    folders = _folders()
    begin = {**_named, **_methods()}
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    if main is not None and is_own(path := Path(main).resolve()):
        begin[path.stem] = path
    for module, path in begin.items():
        _add(found, *(_place(path, folders) or (f"{module.replace('.', '/')}.py", path)))
    within = {path.parent for path in begin.values()}
    for other in list(sys.modules.values()):
        file = getattr(other, "__file__", None)
        if file and any(Path(file).is_relative_to(folder) for folder in within) and is_own(path := Path(file).resolve()):
            _add(found, *(_place(path, folders) or (path.name, path)))
    left = list(found)
    while left:
        below = left.pop()
        whole = found[below].as_posix()
        root = Path(whole.removesuffix(below)) if whole.endswith(below) else found[below].parent
        for module in imported(found[below], root):
            for more, path in _files_of(module, folders):
                if _add(found, more, path):
                    left.append(more)
    return dict(sorted(found.items()))


def _methods() -> dict[str, Path]:
    """Return the methods of the user's own that are imported, files by module."""
    loaded = {point.value: getattr(sys.modules.get(point.value), "__file__", None) for point in offered(METHODS)}
    return {module: path for module, file in loaded.items() if file and is_own(path := Path(file).resolve())}


def _add(found: dict[str, Path], below: str, path: Path) -> bool:
    if below in found:
        return False
    found[below] = path
    return True


def _folders() -> list[Path]:
    """Return the folders of sys.path that may hold files of the user's, in its order."""
    known = [Path(entry or ".").resolve() for entry in sys.path]
    own = [p for p in known if not _PACKAGES & set(p.parts) and not any(p.is_relative_to(o) for o in _others())]
    return [p for p in dict.fromkeys(own) if p.is_dir()]


def _place(path: Path, folders: Iterable[Path]) -> tuple[str, Path] | None:
    """Return the file's path below the nearest of `folders`, and the file; None if it is below none."""
    above = [folder for folder in folders if path.is_relative_to(folder)]
    if not above:
        return None
    return path.relative_to(max(above, key=lambda folder: len(folder.parts))).as_posix(), path


def _files_of(module: str, folders: Iterable[Path]) -> Iterator[tuple[str, Path]]:
    """Yield the user's own files that an import of `module` runs: its packages', and its own."""
    first = module.partition(".")[0]
    if first in (*OURS, *sys.builtin_module_names, *sys.stdlib_module_names):
        return
    for folder in folders:
        if (folder / first).is_dir() or (folder / f"{first}.py").is_file():
            found = [path for path in modules_of(module, folder) if is_own(path.resolve())]
            yield from ((path.relative_to(folder).as_posix(), path.resolve()) for path in found)
            return
