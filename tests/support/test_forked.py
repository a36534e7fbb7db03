"""A forked program is what a process of its own would be: status, streams, group and fresh state; and none is left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.support import forked
from tests.support.forked import ROOT, ForkServer, run, start

STATE = "import sys, jobs.pretrain as p; p.seen = getattr(p, 'seen', 0) + 1; print(p.seen, *sys.argv[1:]); print('x', file=sys.stderr)"


def test_status_words_and_streams_are_those_of_a_process(tmp_path: Path) -> None:
    done = run(["-c", f"{STATE}; sys.exit(7)", "a b", "c"])
    assert (done.returncode, done.stdout, done.stderr) == (7, "1 a b c\n", "x\n")
    assert run(["-c", STATE]).stdout == "1\n", "what one has changed the next one does not see"
    (tmp_path / "program.py").write_text("import beside, sys\nsys.exit(__name__ + beside.X)")
    (tmp_path / "beside.py").write_text("X = '!'")
    done = run([tmp_path / "program.py"])
    assert (done.returncode, done.stderr) == (1, "__main__!\n")
    raised = run(["-c", "raise ValueError('so')"])
    assert raised.returncode == 1
    assert raised.stderr.endswith("ValueError: so\n")
    assert run(["-m", "jobs.export", "nowhere"]).returncode == 2


def test_folder_and_environment_are_those_that_were_given(tmp_path: Path) -> None:
    code = "import os; print(os.getcwd(), os.environ.get('ONE'), os.environ.get('HOME'), os.getsid(0) == os.getpid())"
    assert run(["-c", code], cwd=tmp_path, env={"ONE": "1"}).stdout == f"{tmp_path} 1 None False\n"
    child = start(["-c", code], stdout=subprocess.PIPE, start_new_session=True)
    assert child.communicate(60)[0].endswith(" True\n")


def test_what_would_run_at_the_end_of_a_process_runs(tmp_path: Path) -> None:
    code = "import atexit, threading, time; atexit.register(print, 'last')\n"
    code += "threading.Thread(target=lambda: (time.sleep(0.2), print('thread'))).start()"
    assert run(["-c", code]).stdout == "thread\nlast\n"


def test_it_can_be_waited_for_and_killed() -> None:
    child = start(["-c", "import time; print('up', flush=True); time.sleep(600)"], stdout=subprocess.PIPE)
    assert child.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.01)
    child.kill()
    assert child.wait(60) == child.poll() == -signal.SIGKILL
    child.send_signal(signal.SIGTERM)  # it has ended: another process may have its number


def test_its_parent_has_one_thread_so_that_no_fork_holds_a_lock_of_another() -> None:
    code = "import os; print(len(os.listdir(f'/proc/{os.getppid()}/task')), os.getppid())"
    threads, parent = map(int, run(["-c", code]).stdout.split())
    assert threads == 1
    assert psutil.Process(parent).parent() == psutil.Process()


def test_whoever_asked_for_them_ends_and_nothing_is_left() -> None:
    code = (
        "import os, signal, subprocess, sys\nfrom tests.support.forked import ForkServer\n"
        "server = ForkServer(modules=['json'])\nchild = server.start(['-c', 'import time; time.sleep(600)'])\n"
        "print(server._process.pid, child.pid, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, timeout=60, check=False
    )
    assert done.returncode == -signal.SIGKILL
    left = [int(word) for word in done.stdout.split()]
    assert len(left) == 2
    deadline = time.monotonic() + 60
    while alive := [p for p in left if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.01)


def test_closed_it_ends_what_it_has_started() -> None:
    server = ForkServer(modules=["json"])
    child = server.start(["-c", "import time; time.sleep(600)"])
    server.close()
    deadline = time.monotonic() + 60
    while psutil.pid_exists(child.pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_in_the_place_of_one_that_was_killed_another_one_starts_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    first = ForkServer(modules=["json"])
    monkeypatch.setattr(forked, "_servers", [first])
    monkeypatch.setattr(forked, "ForkServer", lambda: ForkServer(modules=["json"]))
    assert run(["-c", "print(1)"]).stdout == "1\n"
    first._process.kill()
    first._process.wait()
    with pytest.warns(UserWarning, match=f"another one starts: status -9, process {first._process.pid}: "):
        assert run(["-c", "print(2)"]).stdout == "2\n"
    forked.server().close()
