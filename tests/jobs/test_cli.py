"""What every command shares: signals, folders, and words that end no line."""

import os
import signal
from pathlib import Path

import pytest

from jobs.cli import INTERRUPTED, STOPPED, Parser, require_printable, require_writable, resolved, stop_on_signals


def test_a_signal_asks_to_stop_and_the_handlers_come_back(capfd: pytest.CaptureFixture[str]) -> None:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
    before = [signal.getsignal(number) for number in numbers]
    for number in numbers:
        with stop_on_signals() as stop:
            assert (stop(), stop.cause) == (False, "")
            os.kill(os.getpid(), number)
            assert (stop(), stop.cause) == (True, number.name)
            os.kill(os.getpid(), signal.SIGUSR1)
            assert stop.cause == number.name  # the first one
    assert [signal.getsignal(number) for number in numbers] == before
    assert "SIGTERM: saving a checkpoint, then stopping\n" in capfd.readouterr().err


def test_a_second_ctrl_c_interrupts_at_once_and_a_second_sigterm_does_not() -> None:
    with stop_on_signals() as stop:
        try:
            for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):  # the first of its kind
                os.kill(os.getpid(), number)
        except KeyboardInterrupt:
            pytest.fail("interrupted by a first Ctrl-C, or by a second SIGTERM")
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert len(stop.received) == 3


def test_the_status_of_a_stop_is_above_that_of_any_death() -> None:
    """srun hands on the highest of its tasks' statuses; ranks that end with the one that died end by a signal, 128 + 64 at most."""
    assert 128 + signal.SIGRTMAX < STOPPED < 256
    assert INTERRUPTED == 128 + signal.SIGINT


def test_what_ends_a_line_is_refused_in_one_line(tmp_path: Path) -> None:
    for text in ("a\nb", "a\x1bb", "a\u2028b"):
        with pytest.raises(ValueError, match="key must hold only printable characters; got 'a") as refused:
            require_printable(text, "key")
        assert str(refused.value).isprintable()
        for check in (require_writable, resolved):
            with pytest.raises(ValueError, match="key must hold only printable characters"):
                check(tmp_path / text, "key")
    require_printable("a b ü", "key")
    with pytest.raises(ValueError, match=r"^the command line must match --help; got unrecognized arguments: c$"):
        Parser(prog="x").parse_args(["c"])


def test_a_folder_is_made_and_nothing_is_left_in_it(tmp_path: Path) -> None:
    require_writable(tmp_path / "a" / "b", "key")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"key must be a folder that can be written; got .*file: File exists"):
        require_writable(tmp_path / "file", "key")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert resolved(tmp_path / "link" / "b", "key") == (tmp_path / "a" / "b").resolve()
