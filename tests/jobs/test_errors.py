"""Every error of a command is one line that names the file and what to do; a closed pipe is none."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cnnjepa.run import files
from cnnjepa.run.files import write_atomic
from jobs import cli
from jobs.cli import begun, exit_status, line_of, printable
from jobs.slurm.queue import SlurmError

ROOT = Path(__file__).resolve().parents[2]


def failing(error: BaseException, after: bool = False) -> Callable[[], int]:
    def command() -> int:
        if after:
            begun()
        raise error

    return command


# Error, and what its line begins with.
ERRORS = [
    (
        OSError(errno.ENOSPC, "No space left", "/runs/a.json"),
        "/runs/a.json must be accessible; got No space left: free space",
    ),
    (OSError(errno.EACCES, "Permission denied", "/runs"), "/runs must be accessible; got Permission denied: make it accessible to you"),
    (OSError(errno.ENOENT, "No such file", "/tmp/x"), "/tmp/x must be accessible; got No such file: it was removed meanwhile"),
    (OSError(errno.ENOTDIR, "Not a directory", "/x/y"), "/x/y must be accessible; got Not a directory: move what"),
    (OSError(errno.EMFILE, "Too many open files", "/x"), "/x must be accessible; got Too many open files: close other programs"),
    (OSError(errno.EIO, "Input/output error"), "a file must be accessible; got Input/output error: type the command again"),
    (RuntimeError("workers end before\nthey claim a trial"), "workers end before they claim a trial"),
    (SlurmError("Slurm refuses"), "Slurm refuses"),
    (ValueError("epochs must be 1"), "epochs must be 1"),
    (KeyError("trials"), "KeyError: 'trials' (test_errors.py, line "),
    (TypeError("no\x1b[2J number"), "TypeError: no\\x1b[2J number (test_errors.py, line "),
]


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(("error", "said"), ERRORS, ids=[said[:30] for _, said in ERRORS])
def test_an_error_is_one_line(error: Exception, said: str, after: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """With status 2 before anything has started, and 1 after that."""
    assert exit_status(failing(error, after)) == (1 if after else 2)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {said}")
    assert len(err.splitlines()) == 1
    assert err.removesuffix("\n").isprintable()


def test_what_began_is_forgotten_with_the_next_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(failing(ValueError("x"), after=True)) == 1
    assert exit_status(failing(ValueError("x"))) == 2
    assert exit_status(failing(KeyboardInterrupt())) == cli.INTERRUPTED
    assert exit_status(lambda: 7) == 7
    assert capsys.readouterr().err.count("error: x") == 2


def test_a_disk_that_is_full_is_named_with_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system names no file where a write or a sync fails."""

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as error:
        write_atomic(tmp_path / "result.json", "{}")
    assert line_of(error.value).startswith(f"{tmp_path / 'result.json'} must be accessible; got No space left on device: free space")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("lines", [1, 100_000])
@pytest.mark.parametrize("flushed", [False, True])
def test_a_closed_pipe_is_no_error(lines: int, flushed: bool) -> None:
    code = f"""
import sys
from jobs.cli import exit_status
def command():
    sys.stdin.readline()  # until nobody reads
    for i in range({lines}):
        print("line", i, flush={flushed})
    return 3
sys.exit(exit_status(command))
"""
    read, write = os.pipe()
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=write, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(write)
    os.close(read)
    _, err = child.communicate("go\n", timeout=60)
    assert (child.returncode, err) == (3, "")


def test_control_characters_are_shown_and_not_obeyed() -> None:
    hostile = "a\x1b]0;pwned\x07b\x9b2J\r\u202ec\u2028\udc80\x00é ± …"
    assert printable(hostile) == "a\\x1b]0;pwned\\x07b\\x9b2J\\r\\u202ec\\u2028\\udc80\\x00é ± …"
    assert printable("a\n\tb", keep="\n\t") == "a\n\tb"
    assert printable("a\n\tb") == "a\\n\\tb"
    assert printable(17) == "17"
