"""Write what a drill of a program has found, for a person and as JSON."""

import json
import textwrap
from pathlib import Path
from typing import Any

from jobs.resuming.causes import Cause
from jobs.resuming.check import Disturbed, Findings
from jobs.resuming.kinds import Kind

_WIDTH = 100
_LABEL = len("  shown by  ")


def near(line: str) -> str:
    """Return a line of a file, relative to the current folder if it is below."""
    path, _, number = line.rpartition(":")
    here = Path.cwd()
    return f"{Path(path).relative_to(here) if path and Path(path).is_relative_to(here) else path}:{number}" if path else ""


def text(found: Findings) -> str:
    """Return the report in words."""
    lines = [_verdict(found)]
    for cause in found.causes:
        lines += ["", *_cause(cause, found)]
    for unsteady in found.unsteady:
        who = "the resumed run" if found.resumed_only else "the program, undisturbed,"
        lines += ["", f"NOT REPEATABLE: {who} depends on: {unsteady.kind.title}"]
        lines += [f"  shown by  {unsteady.first.text}", f"  fix       {unsteady.kind.fix('')}"]
    for number, one in enumerate(found.disturbed, start=1):
        if one.failed:
            lines += ["", f"FAILED: run {number}, {_how(one)}, does not end once it is resumed", f"  shown by  {one.failed}"]
            lines += ["  fix       Run it with the state that it has saved, and see its last lines above that error."]
        elif one.different and not found.causes:
            lines += ["", f"DIFFERENT: run {number}, {_how(one)}", f"  first     {one.different[0].text}"]
    if outlived := next((d for d in found.disturbed if d.outlived_seconds), None):
        lines += ["", f"note: the command did not end within {outlived.outlived_seconds:g} s of SIGTERM: it was killed, as in a sweep"]
    if found.times:
        shown = ", ".join(found.times)
        lines += ["", f"not compared, since they measure time: {shown}"]
    return "\n".join(part for line in lines for part in _wrapped(line))


def _wrapped(line: str) -> list[str]:
    """Return a line in lines of at most 100 characters, the further ones below the words of the first."""
    indent = " " * (_LABEL if line.startswith("  ") else 2)
    return textwrap.wrap(line, _WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False) or [""]


def _verdict(found: Findings) -> str:
    wrong = sum(bool(d.different or d.failed) for d in found.disturbed)
    size = f"{found.reports} reports" + f" and {found.saves} saves" * bool(found.saves)
    if found.holds:
        return f"NOTHING IS FORGOTTEN: {len(found.disturbed)} disturbed runs equal the undisturbed one, in {size}"
    if not found.disturbed:
        return f"NOT REPEATABLE: two undisturbed runs differ, in {size}; none was disturbed"
    return f"{wrong} of {len(found.disturbed)} disturbed runs differ from the undisturbed one, in {size}"


def _how(one: Disturbed) -> str:
    return f"{'asked to stop' if one.stopped else 'killed'} after {one.moment.save}"


def _cause(cause: Cause, found: Findings) -> list[str]:
    name = f": {cause.name}" if cause.name else ""
    first = next(d for d in found.disturbed if d.different)
    lines = [f"FORGOTTEN: {cause.kind.title}{name}" + f" ({cause.size})" * bool(cause.size)]
    lines += [f"  shown by  {first.different[0].text}; run {_how(first)}"]
    if cause.proved:
        lines.append(f"  proved    with it put back at {near(found.where)}, the resumed run equals the undisturbed one")
    elif cause.kind is not Kind.unknown:
        lines.append(f"  likely    all that variables hold was put back at {near(found.where)}, and this differs first")
    if found.restored_at:
        lines.append(f"  where     the state is read at {near(found.restored_at)}, and saved at {near(found.saved_at)}")
    return [*lines, f"  fix       {cause.kind.fix(cause.name)}"]


def as_json(found: Findings) -> str:
    """Return the report as one JSON object."""
    causes: list[dict[str, Any]] = [
        {"kind": c.kind.title, "name": c.name, "size": c.size, "proved": c.proved, "fix": c.kind.fix(c.name)} for c in found.causes
    ]
    unsteady = [
        {"kind": u.kind.title, "resumed_only": found.resumed_only, "first": u.first.text, "fix": u.kind.fix("")} for u in found.unsteady
    ]
    disturbed = [
        {
            "after": d.moment.save,
            "lines": d.moment.line,
            "how": "stop" if d.stopped else "kill",
            "failed": d.failed,
            "outlived_seconds": d.outlived_seconds,
            "differences": len(d.different),
            "first": None if not d.different else {"step": d.different[0].step, "name": d.different[0].name, "text": d.different[0].text},
        }
        for d in found.disturbed
    ]
    about = {"reports": found.reports, "saves": found.saves, "runs": found.runs, "not_compared": found.times}
    where = {"compared_at": found.where, "restored_at": found.restored_at, "saved_at": found.saved_at}
    return json.dumps(
        {"holds": found.holds, "forgotten": causes, "not_repeatable": unsteady, "disturbed": disturbed, **about, **where}, indent=2
    )
