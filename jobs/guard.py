"""Run a command in a session of its own, all of which ends when the process that started it does.

    python guard.py LIFELINE STATUS WORD...

LIFELINE is the descriptor of a pipe: when its other side is closed for any reason, every process of the
group is killed. STATUS is that of another, which gets `exit 3` or `signal 9` once the command and
what it left running have ended. Standard library only, since each start of a run pays for it.
"""

import contextlib
import ctypes
import os
import select
import signal
import sys

_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def _prctl(option: int, value: int) -> None:
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _started(words: list[str]) -> int:
    """Start the command; return its process number."""
    child = os.fork()
    if child:
        for number in signal.sigpending() & set(_STOPS):  # sent before there was a command that could get them
            os.kill(child, number)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
        return child
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # should this guard be killed alone
    for number in _STOPS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
    try:
        os.execvp(words[0], words)  # noqa: S606, no shell is wanted
    except OSError as error:
        os.write(2, f"{words[0]}: {error.strerror}\n".encode())
        os._exit(127)


def main() -> None:
    """Run the command line."""
    lifeline, status = int(sys.argv[1]), int(sys.argv[2])
    for descriptor in (lifeline, status):
        os.set_inheritable(descriptor, False)
    asked = []
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)  # until the command is there; a Ray worker blocks some for ever
    for number in _STOPS:
        signal.signal(number, lambda number, _: asked.append(number))  # they are for the command
    woken, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # what the command leaves behind becomes a child of this process
    command, ended = _started(sys.argv[3:]), -1
    while True:
        try:
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                if found[0] == command:
                    ended = found[1]
                    if not asked:  # else they are saving
                        os.killpg(0, signal.SIGTERM)
        except ChildProcessError:
            break
        ready = select.select([lifeline, woken], [], [])[0]
        if lifeline in ready:
            os.killpg(0, signal.SIGKILL)
        if woken in ready:
            os.read(woken, 512)
    said = f"signal {os.WTERMSIG(ended)}" if os.WIFSIGNALED(ended) else f"exit {os.WEXITSTATUS(ended)}"
    os.write(status, said.encode())


if __name__ == "__main__":
    main()
