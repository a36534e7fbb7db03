"""Parts of a long check: each has its time, ends with all that it started, and stops no other."""

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

from _in_parts import Part, end_all, run_parts

# Parts, each in its own process.


def part(name: str, code: str, least: float = 0.0, most: float = 60.0, needs: tuple[str, ...] = ()) -> Part:
    return Part(name, [sys.executable, "-S", "-c", code], least, most, needs)


def answering(wrong: list[str]) -> str:
    reported = {"figures": {"x": 1, "far": math.inf}, "wrong": wrong, "said": ["it is so"]}
    return f"import sys; open(sys.argv[1], 'w').write({json.dumps(reported)!r})"


def test_a_part_that_fails_is_reported_and_the_others_still_run(tmp_path: Path) -> None:
    parts = [
        part("broken", "print('before'); raise ValueError('a planted fault')"),
        part("silent", "import os; os._exit(3)"),
        part("mute", "print('no answer')"),
        part("answered and broke", answering([]) + "; sys.exit('too late')"),
        part("wrong", answering(["1 is not 2", "3 is not 4"])),
        part("of the wrong", answering([]), needs=("wrong",)),
        part("good", answering([])),
        part("of the good", answering([]), needs=("good",)),
        part("long", answering([]), least=1e9),
    ]
    begun: list[str] = []
    found = run_parts(parts, tmp_path, time.monotonic() + 600, tmp_path, begun.append)
    assert [(name, o.outcome) for name, o in found.items()] == [
        ("broken", "failed"),
        ("silent", "failed"),
        ("mute", "failed"),
        ("answered and broke", "failed"),
        ("wrong", "failed"),
        ("of the wrong", "not run"),
        ("good", "passed"),
        ("of the good", "passed"),
        ("long", "not run"),
    ]
    assert begun == ["broken", "silent", "mute", "answered and broke", "wrong", "good", "of the good"]
    assert found["broken"].why == "ValueError: a planted fault"
    assert found["broken"].last_lines[0] == "before"
    assert found["silent"].why == "ended with status 3 and no word"
    assert found["mute"].why == "no answer"
    assert found["answered and broke"].why == "too late"
    assert found["wrong"].why == "1 is not 2; 3 is not 4"
    assert found["of the wrong"].why == "wrong has not passed"
    assert found["long"].why.startswith("no time left: ")
    assert (found["good"].figures["x"], found["good"].said, found["good"].why) == (1, ["it is so"], "")


# In a session of its own, as torchrun's ranks are.
STARTS_ANOTHER = """
import subprocess, sys, time
sleep = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]
print(subprocess.Popen(sleep, start_new_session=True).pid, flush=True)
time.sleep(600)
"""


def test_a_part_is_ended_with_all_that_it_started() -> None:
    process = subprocess.Popen([sys.executable, "-S", "-c", STARTS_ANOTHER], stdout=subprocess.PIPE)
    assert process.stdout is not None
    other = int(process.stdout.readline())
    assert not _is_gone(other, within=0)
    end_all(process)
    process.stdout.close()
    assert process.returncode == -signal.SIGKILL
    assert _is_gone(other)
    end_all(process)  # whose number may be another's by now


def test_a_part_that_hangs_is_ended_and_the_others_still_run(tmp_path: Path) -> None:
    parts = [part("hangs", "import time; time.sleep(600)", most=0.5), part("after", answering([]))]
    found = run_parts(parts, tmp_path, time.monotonic() + 600, tmp_path, lambda name: None)
    assert (found["hangs"].outcome, found["hangs"].why) == ("failed", "ended after 0 s, the time it had")
    assert found["after"].outcome == "passed"


def _is_gone(pid: int, within: float = 60.0) -> bool:
    """Whether a killed process is dead; one that nobody waits for may still be listed."""
    deadline = time.monotonic() + within
    while True:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.02)


def test_no_more_time_than_the_whole_has_is_given_to_a_part(tmp_path: Path) -> None:
    found = run_parts(
        [part("hangs", "import time; time.sleep(600)", most=20)], tmp_path, time.monotonic() + 0.5, tmp_path, lambda name: None
    )
    assert found["hangs"].why == "ended after 0 s, the time it had"
