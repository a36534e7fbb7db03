"""Say how the code of two sweeps differs: commits, versions of packages, and files of their copies."""

import collections
import shlex
from collections.abc import Mapping
from pathlib import Path

from jobs import program
from sweeps.report.html_text import Provenance, provenances
from sweeps.state.view import View

_NAMED = 8  # files in a line
_RECORD = "code.json"  # beside a copy: its commit


def code_lines(first: View, second: View) -> list[str]:
    """Return a line for each way in which the code differs, or one that says that it does not."""
    known = [provenances(view)[0] for view in (first, second)]
    lines = [line for line in (_commits(known[0], known[1]), *_versions(known[0], known[1])) if line]
    lines += _files(_newest_copy(first.sweep.path), _newest_copy(second.sweep.path))
    own = [program.read(view.sweep.path) for view in (first, second)]
    if own[0] is not None and own[1] is not None and (changed := own[1].changed_from(own[0])):
        lines.append(f"the program differs in {_named(changed)}")
    lines += [
        f"{path}: no run has recorded its code" for view, found in zip((first, second), known) for path in [view.sweep.path] if not found
    ]
    return lines or ["the code is the same"]


def _commits(first: list[Provenance], second: list[Provenance]) -> str:
    of_each = [_counted(found) for found in (first, second)]
    if of_each[0].keys() == of_each[1].keys() or not all(of_each):
        return ""
    return f"commit: {_listed(of_each[0])} -> {_listed(of_each[1])}"


def _counted(found: list[Provenance]) -> "collections.Counter[str]":
    return collections.Counter(f"{p.commit[:12] or 'unknown'}{' with changes' * bool(p.diff)}" for p in found)


def _listed(found: "collections.Counter[str]") -> str:
    return " and ".join(f"{what} ({n} runs)" if len(found) > 1 else what for what, n in found.most_common())


def _versions(first: list[Provenance], second: list[Provenance]) -> list[str]:
    """Return 'torch: 2.4.0 -> 2.5.1' for each package whose versions differ."""
    lines = []
    every = [{"Python": {p.python for p in found}} for found in (first, second)]
    for of, found in zip(every, (first, second)):
        for p in found:
            for name, version in p.packages.items():
                of.setdefault(name, set()).add(version)
    for name in every[0].keys() & every[1].keys():
        a, b = every[0][name], every[1][name]
        if a != b and a and b:
            lines.append(f"{name}: {' and '.join(sorted(a)) or 'none'} -> {' and '.join(sorted(b)) or 'none'}")
    return sorted(lines)


def _newest_copy(folder: Path) -> Path | None:
    copies = [path for path in (folder / "code").glob("[!.]*") if path.is_dir()]
    return max(copies, key=lambda path: path.stat().st_mtime, default=None)


def _files(first: Path | None, second: Path | None) -> list[str]:
    """Return a line about the files in which two copies of the code differ."""
    if first is None or second is None or first.name == second.name:  # named by their content
        return []
    of_each = [_content(copy) for copy in (first, second)]
    changed = sorted(name for name in of_each[0].keys() | of_each[1].keys() if of_each[0].get(name) != of_each[1].get(name))
    return [f"the copies of the code differ in {_named(changed)}: {shlex.join(['diff', '-r', str(first), str(second)])}"] if changed else []


def _content(copy: Path) -> Mapping[str, bytes]:
    return {p.relative_to(copy).as_posix(): p.read_bytes() for p in copy.rglob("*") if p.is_file() and p != copy / _RECORD}


def _named(files: list[str]) -> str:
    shown = ", ".join(files[:_NAMED]) + ", ..." * (len(files) > _NAMED)
    return f"{len(files)} file{'s' * (len(files) != 1)} ({shown})"
