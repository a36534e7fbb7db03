"""Start Python programs in a fraction of a second: by forks of a process that has imported what they import.

An import of torch takes seconds, and most tests that start `python -m jobs.pretrain` or a rank look at what the program does, not at how it
is imported. Tests of imports, of torchrun and of Ray start processes of their own.
"""

import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]

# Runs in the parent of all forks. It never computes: a fork of a process with threads would hold locks whose owners are not there.
_SERVER = """
import gc, json, os, runpy, select, signal, socket, sys

def run(words):
    if words[0] == "-m":
        sys.argv = words[1:]
        for name in (words[1], words[1] + ".__main__"):  # which is about to run under the name of __main__
            sys.modules.pop(name, None)
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        main = type(sys)("__main__")
        sys.modules["__main__"] = main
        exec(compile(words[1], "<string>", "exec"), main.__dict__)
    else:
        sys.argv = words
        sys.path.insert(0, os.path.dirname(os.path.abspath(words[0])))
        runpy.run_path(words[0], run_name="__main__")

def become(asked, streams, report, others):
    if asked["session"]:
        os.setsid()
    os.write(report, b"%d\\n" % os.getpid())
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for descriptor in (report, *others):
        os.close(descriptor)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, descriptor in enumerate((nothing, *streams)):
        os.dup2(descriptor, number)
    for descriptor in (nothing, *streams):
        if descriptor > 2:
            os.close(descriptor)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    import numpy
    numpy.random.seed()
    status = 1
    try:
        run(asked["words"])
        status = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        # What the interpreter does at its end, less taking modules apart.
        import atexit, threading
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

def serve(channel):
    reports = {}
    wake = os.pipe2(os.O_NONBLOCK)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.set_wakeup_fd(wake[1], warn_on_full_buffer=False)
    gc.collect()
    gc.freeze()
    while True:
        ready = select.select([channel, wake[0]], [], [])[0]
        if wake[0] in ready:
            os.read(wake[0], 4096)
            for child in list(reports):
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    report = reports.pop(child)
                    try:
                        os.write(report, b"%d\\n" % os.waitstatus_to_exitcode(status))
                    except BrokenPipeError:
                        pass
                    os.close(report)
        if channel in ready:
            head, descriptors, _, _ = socket.recv_fds(channel, 8, 3)
            if not head:
                break
            text = b""
            while len(text) < int.from_bytes(head, "big"):
                text += channel.recv(int.from_bytes(head, "big") - len(text))
            *streams, report = descriptors
            threads = os.listdir("/proc/self/task")
            assert len(threads) == 1, "a process with threads must not fork"
            child = os.fork()
            if child == 0:
                become(json.loads(text), streams, report, [channel.fileno(), *wake, *reports.values()])
            for descriptor in streams:
                os.close(descriptor)
            reports[child] = report
    for child in reports:  # whoever asked for them has ended
        os.kill(child, signal.SIGKILL)

sys.path[0] = os.getcwd()
import importlib
for name in json.loads(sys.argv[2]):
    importlib.import_module(name)
serve(socket.socket(fileno=int(sys.argv[1])))
"""
# What the programs import at their start or soon after.
MODULES = (
    *("torch", "torch.distributed", "sklearn.datasets", "PIL.Image", "pyarrow", "hydra", "yaml"),
    *("jobs.pretrain", "jobs.export", "sweeps.cli.run", "sweeps.report.aggregate", "sweeps.__main__"),
)
_Stream = int | IO[Any] | None


class Forked:
    """A program that runs, with as much of `subprocess.Popen` as tests need."""

    def __init__(self, words: Sequence[str], report: int, streams: tuple[IO[bytes] | None, IO[bytes] | None]) -> None:
        self.args, self._report, self._streams = list(words), report, streams
        self.returncode: int | None = None
        self._line = b""
        pid = self._next_line(60)
        if pid is None:
            raise RuntimeError(f"the process that forks has not started {words}")
        self.pid = pid

    def _next_line(self, timeout: float | None) -> int | None:
        """Return the next number of the report, None where none comes in time."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while b"\n" not in self._line:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self._report], [], [], left)[0]:
                return None
            more = os.read(self._report, 1)
            if not more:
                raise RuntimeError("the process that forks has ended, and with it what tells when its forks end")
            self._line += more
        line, self._line = self._line, b""
        return int(line)

    def poll(self) -> int | None:
        """Return the exit status, None while it runs."""
        if self.returncode is None and (status := self._next_line(0)) is not None:
            self._end(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit status; raise TimeoutExpired where it still runs after `timeout` seconds."""
        if self.returncode is None:
            status = self._next_line(timeout)
            if status is None:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self._end(status)
        assert self.returncode is not None
        return self.returncode

    def _end(self, status: int) -> None:
        self.returncode = status
        os.close(self._report)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait, and return all that it has printed to those streams that were asked for as pipes."""
        self.wait(timeout)
        said = []
        for stream in self._streams:
            if stream is None:
                said.append("")
            else:
                stream.seek(0)
                said.append(stream.read().decode())
        return said[0], said[1]

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """The process that forks; `root` is where it imports the project from, `environment` what it starts with."""

    def __init__(self, root: Path = ROOT, environment: Mapping[str, str] | None = None, modules: Sequence[str] = MODULES) -> None:
        ours, theirs = socket.socketpair()
        path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
        # No threads of OpenMP, BLAS or pyarrow's allocator: they would be there before a fork, and not after it.
        alone = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
        environment = {**(environment or os.environ), **alone, "PYTHONPATH": path}
        line = [sys.executable, "-c", _SERVER, str(theirs.fileno()), json.dumps(modules)]
        self._said = tempfile.TemporaryFile()  # noqa: SIM115, of its own: pytest throws away what comes between two tests
        pipes = {"stdin": subprocess.DEVNULL, "stderr": self._said}
        self._process = subprocess.Popen(line, cwd=root, env=environment, pass_fds=[theirs.fileno()], start_new_session=True, **pipes)
        theirs.close()
        self._channel, self._root, self._owner = ours, root, os.getpid()

    def start(
        self,
        words: Sequence[str],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        stdout: _Stream = None,
        stderr: _Stream = None,
        start_new_session: bool = False,
    ) -> Forked:
        """Start `python *words`: `-m module`, `-c code` or a file, with arguments; the streams are what `subprocess.Popen` takes."""
        kept: list[IO[bytes] | None] = []
        opened: list[int] = []
        descriptors: list[int] = []
        for own, stream in ((1, stdout), (2, stderr)):
            kept.append(tempfile.TemporaryFile() if stream == subprocess.PIPE else None)  # noqa: SIM115
            if (file := kept[-1]) is not None:
                descriptors.append(file.fileno())
            elif stream == subprocess.STDOUT:
                descriptors.append(descriptors[0])
            elif stream == subprocess.DEVNULL:
                opened.append(os.open(os.devnull, os.O_WRONLY))
                descriptors.append(opened[-1])
            else:
                descriptors.append(own if stream is None else stream if isinstance(stream, int) else stream.fileno())
        report, reports = os.pipe()
        asked = {
            "words": [os.fspath(w) for w in words],
            "cwd": str(cwd or self._root),
            "environment": dict(os.environ if env is None else env),
            "session": start_new_session,
        }
        text = json.dumps(asked).encode()
        socket.send_fds(self._channel, [len(text).to_bytes(8, "big")], [*descriptors, reports])
        self._channel.sendall(text)
        for descriptor in (*opened, reports):
            os.close(descriptor)
        return Forked(words, report, (kept[0], kept[1]))

    def run(
        self, words: Sequence[str], *, cwd: Path | None = None, env: Mapping[str, str] | None = None, timeout: float = 300
    ) -> subprocess.CompletedProcess[str]:
        """Do what `subprocess.run` does with `capture_output` and `text`."""
        child = self.start(words, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            out, err = child.communicate(timeout)
        finally:
            child.kill()
        assert child.returncode is not None
        return subprocess.CompletedProcess(list(words), child.returncode, out, err)

    def ended(self) -> str:
        """How it ended and what it said last; "" while it runs."""
        if self._owner != os.getpid() or (status := self._process.poll()) is None:
            return ""
        self._said.seek(0)
        return f"status {status}, process {self._process.pid}: {self._said.read()[-2000:].decode(errors='replace')}"

    def close(self) -> None:
        """End it, and all that it started."""
        self._channel.close()
        if self._owner == os.getpid():  # a fork of the test process is not its parent
            self._process.wait(timeout=60)


_servers: list[ForkServer] = []


def server() -> ForkServer:
    """The one of this process of tests; it ends with it, whatever ends it. In the place of one that was killed another one starts."""
    if killed := _servers and _servers[0].ended():
        warnings.warn(f"the process that forks has ended, and another one starts: {killed}", stacklevel=2)
    if killed or not _servers or _servers[0]._owner != os.getpid():
        _servers[:] = [ForkServer()]
        atexit.register(_servers[0].close)
    return _servers[0]


def start(words: Sequence[str], **options: Any) -> Forked:
    """Start `python *words`; see `ForkServer.start`."""
    return server().start(words, **options)


def run(words: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `python *words` to its end; see `ForkServer.run`."""
    return server().run(words, **options)
