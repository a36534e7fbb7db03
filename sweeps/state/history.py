"""Record in commands.jsonl which commands ran a sweep, and from which commit, for the report."""

import contextlib
import datetime
import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from cnnjepa.run.files import write_atomic
from jobs.provenance import commit_and_diff, scrubbed, typed

_NAME = "commands.jsonl"


def note_command(folder: Path, command: Sequence[str] | None = None) -> None:
    """Append a command, by default that of this process, unless it repeats the last one.

    Likely secrets are removed. Disk errors are ignored.
    """
    words = typed() if command is None else [scrubbed(word) for word in command]
    known = commands(folder)
    found = commit_and_diff()
    line = {"command": words, "commit": found["commit"], "changed": bool(found["diff"])}
    if known and {**known[-1], "time": None} == {**line, "time": None}:
        return
    line["time"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if known and (folder / _NAME).stat().st_nlink > 1:  # a copy made of hard links: the original has the same file
            write_atomic(folder / _NAME, (folder / _NAME).read_bytes())
        with open(folder / _NAME, "ab", buffering=0) as file:
            file.write(json.dumps(line).encode() + b"\n")


def last_command(folder: Path) -> list[str]:
    """Return the words of the last recorded command, or []."""
    words = commands(folder)[-1:]
    found = words[0]["command"] if words else []
    return [str(word) for word in found] if isinstance(found, list) else []


def called_from_python(words: Sequence[object]) -> bool:
    """Return whether `words` record a call of `run` of the Python API, which begins with run(NAME)."""
    return bool(words) and str(words[0]).startswith("run(") and str(words[0]).endswith(")")


def in_words(command: object) -> str:
    """Return a recorded command so that it can be typed again, or a call of the Python API in words."""
    if not isinstance(command, list):
        return str(command)
    if not called_from_python(command):
        return shlex.join(map(str, command))
    first, *more = map(str, command)
    return f"{first} from Python" + (f", with {shlex.join(more)}" if more else "")


def commands(folder: Path) -> list[dict[str, object]]:
    """Return the recorded commands, oldest first. Torn lines are skipped."""
    try:
        text = (folder / _NAME).read_bytes()
    except OSError:
        return []
    found = []
    for line in text.split(b"\n"):
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and {"command", "commit", "changed", "time"} <= value.keys():
            found.append(value)
    return found
