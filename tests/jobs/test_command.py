"""A command as a task: killed, stopped by a signal, restarted with its folder, pruned, and refused where it cannot run."""

import contextlib
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from cnnjepa.run.folder import RunError, RunResult, RunStatus, no_judge
from jobs.command import CommandTask, parsed, placeholders, written
from jobs.program import with_imports
from sweeps.spec.space import choice, real, whole
from sweeps.spec.sweep import Configuration, SweepSpec
from tests.support.killed_run import EXAMPLES, attempt, configured, loaded, scores

# Counts in {run_dir}/epoch; the words after its folder are shell that runs in each epoch, once it is saved and reported.
_COUNT = """
epoch=$(cat "$1/epoch" 2>/dev/null || echo 0)
while [ "$epoch" -lt "$2" ]; do
    epoch=$((epoch + 1)); echo $epoch > "$1/epoch"; echo "{\\"epoch\\": $epoch, \\"loss\\": $((100 - epoch))}" >> "$SWEEP_REPORT"
    eval "$3"
done
"""


@pytest.fixture
def counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Make the configuration of a command that counts its epochs, and runs shell in each."""
    (tmp_path / "count.sh").write_text(_COUNT)

    def made(shell: str = "true", **more: Any) -> Any:
        words = ["bash", "count.sh", "{run_dir}", "{epochs}", shell.replace("{", "{{").replace("}", "}}")]
        task = CommandTask(words, {"epochs": [4]}, objective="loss", direction="minimize", **more)
        name = f"counting_{abs(hash((shell, tmp_path)))}"
        (tmp_path / f"{name}.py").write_text("")
        module = loaded(tmp_path / f"{name}.py")
        module.TASK = task  # type: ignore[attr-defined]
        return configured(SweepSpec(task=task))[1]

    return made


@pytest.mark.slow
def test_a_command_runs_to_its_end_and_what_it_reports_is_the_run_s(counting: Callable[..., Any], tmp_path: Path) -> None:
    result = attempt(counting(), tmp_path / "run", 1)
    assert result is not None
    assert (result.status, result.metrics, result.step) == (RunStatus.completed, {"loss": 96.0}, 4)
    assert [r["loss"] for r in scores(tmp_path / "run") if r["kind"] == "step"] == [99, 98, 97, 96]


@pytest.mark.slow
def test_a_command_that_is_killed_or_stops_by_itself_goes_on_and_one_that_gains_nothing_fails(
    counting: Callable[..., Any], tmp_path: Path
) -> None:
    for name, shell in (("killed", "kill -9 $$"), ("stopped", "exit 75")):
        result = attempt(counting(f'[ "$epoch" = 4 ] || {shell}'), tmp_path / name, 1)
        assert result is not None
        assert (result.status, list(result.probes)) == (RunStatus.completed, ["1", "2", "3", "4"])
    with pytest.raises(RunError, match=r"must gain an epoch before it stops by itself; got exit 75 twice at 1"):
        attempt(counting('echo 0 > "$1/epoch"; exit 75'), tmp_path / "in vain", 1)
    with pytest.raises(RunError, match=r"must end with status 0; got exit 3: see .*train\.log"):
        attempt(counting("exit 3"), tmp_path / "failed", 1)


def _stopped_after(path: Path, epochs: int) -> Callable[[], bool]:
    return lambda: (path / "files" / "epoch").exists() and int((path / "files" / "epoch").read_text() or 0) >= epochs


@pytest.mark.slow
@pytest.mark.parametrize("how", ["trap 'exit 75' TERM; ", "", "trap 'exit 0' TERM; ", "trap 'exit 9' TERM; "])
def test_a_command_is_stopped_by_sigterm_and_goes_on_when_it_is_started_again(
    how: str, counting: Callable[..., Any], tmp_path: Path
) -> None:
    config, path = counting(f"{how}sleep 0.2"), tmp_path / "run"
    assert attempt(config, path, 1, stop=_stopped_after(path, 2)) is None
    reached = int((path / "files" / "epoch").read_text())
    assert 2 <= reached < 4
    result = attempt(config, path, 2)
    assert result is not None
    assert list(result.probes) == ["1", "2", "3", "4"]
    assert (path / "reports.2.jsonl").read_text().count("\n") == 4 - reached


@pytest.mark.slow
def test_a_command_that_does_not_end_is_killed_after_its_grace(counting: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "run"
    config = counting("trap '' TERM; sleep 60", grace_seconds=0.3)
    began = time.monotonic()
    assert attempt(config, path, 1, stop=_stopped_after(path, 1)) is None
    assert time.monotonic() - began < 20


@pytest.mark.slow
def test_a_command_is_pruned_by_a_signal(counting: Callable[..., Any], tmp_path: Path) -> None:
    def judge(epoch: int, metrics: dict[str, float]) -> str:
        return "not among the best" if epoch == 2 else ""

    result = attempt(counting("sleep 0.3"), tmp_path / "run", 1, judge=judge)
    assert result is not None
    assert (result.status, result.cause) == (RunStatus.pruned, "not among the best")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("no json", 'each line of SWEEP_REPORT must be a JSON object with a whole "epoch" or "step", and numbers; got \'no json\''),
        ('{"loss": 1}', "each line of SWEEP_REPORT must be a JSON object"),
        ('{"epoch": 9, "loss": "low"}', "SWEEP_REPORT: run.report must be given numbers; got loss='low', a str"),
        ('{"epoch": 0, "loss": 1}', "SWEEP_REPORT: run.report must be given whole epochs or steps that do not fall; got 0 after 1"),
    ],
)
def test_a_wrong_report_fails_the_run_in_one_line(line: str, said: str, counting: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(RunError) as raised:
        attempt(counting(f"echo {shlex.quote(line)} >> $SWEEP_REPORT"), tmp_path / "run", 1)
    assert said in str(raised.value)


@pytest.mark.parametrize("before", [True, False])
def test_a_signal_reaches_the_command_though_it_is_early_or_blocked_where_the_run_is(before: bool) -> None:
    guard = Path(sys.modules[CommandTask.__module__].__file__ or "").with_name("guard.py")
    life, lifeline = os.pipe()
    status, out = os.pipe()

    def block() -> None:  # as in a worker of Ray; a signal that comes now is there once the guard begins
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        if before:
            os.kill(os.getpid(), signal.SIGTERM)

    words = [sys.executable, "-S", "-E", str(guard), str(life), str(out), "sh", "-c", "echo begun; exec sleep 30"]
    with subprocess.Popen(words, start_new_session=True, pass_fds=(life, out), stdout=subprocess.PIPE, preexec_fn=block) as made:
        os.close(out)
        os.close(life)
        try:
            if not before:
                assert made.stdout is not None
                assert made.stdout.readline() == b"begun\n"
                os.killpg(made.pid, signal.SIGTERM)
            assert select.select([status], [], [], 20)[0]
            # As the run reads it: a guard that a signal ends before it has begun says nothing, and starts nothing.
            assert (os.read(status, 64).decode() or f"signal {-made.wait(20)}") == "signal 15"
        finally:
            os.close(lifeline)
            os.close(status)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["worker", "guard"])
def test_nothing_of_a_command_outlives_what_started_it(victim: str, tmp_path: Path) -> None:
    (tmp_path / "run.sh").write_text('sleep 300 & sleep 300; echo "$1"\n')
    guard = Path(sys.modules[CommandTask.__module__].__file__ or "").with_name("guard.py")
    code = (
        "import os, subprocess, sys, time\n"
        "life, lifeline = os.pipe(); status, out = os.pipe()\n"
        f"words = [sys.executable, '-S', '-E', {str(guard)!r}, str(life), str(out), 'bash', {str(tmp_path / 'run.sh')!r}]\n"
        "made = subprocess.Popen(words, start_new_session=True, pass_fds=(life, out)); os.close(life)\n"
        "print(made.pid, flush=True); time.sleep(300)\n"
    )
    worker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert worker.stdout is not None
        leader = int(worker.stdout.readline())
        group: list[psutil.Process] = []
        deadline = time.monotonic() + 20
        while len(group) < 4 and time.monotonic() < deadline:  # guard, bash and two that sleep
            time.sleep(0.05)
            group = [*psutil.Process(leader).children(recursive=True), psutil.Process(leader)]
        assert len(group) == 4
        os.kill(worker.pid if victim == "worker" else leader, signal.SIGKILL)
        if victim == "guard":  # the command itself goes with it; what it started is the worker's to kill
            group = [p for p in group if p.ppid() in (leader, 1) and p.name() == "bash"]
        _, left = psutil.wait_procs(group, timeout=20)
        assert left == []
    finally:
        worker.kill()
        worker.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(leader, signal.SIGKILL)


@pytest.mark.slow
def test_the_example_in_bash_is_run_from_its_copy(tmp_path: Path) -> None:
    _, config = configured(loaded(EXAMPLES / "shell_walk.py").SWEEP, "epochs=3", "step=50")
    result = attempt(config, tmp_path / "run", 1)
    assert isinstance(result, RunResult)
    assert list(result.probes) == ["1", "2", "3"]
    assert "{run_dir}" in config.command


@pytest.mark.parametrize(
    ("command", "values", "said"),
    [
        ([], {}, "command must have at least the program; got no word"),
        (
            ["x", "{lr}"],
            {},
            "command must have a value for each {key}, in configurations, in the space or in defaults; got {lr}",
        ),
        (["x", "{seed}"], {"lr": [1]}, "command must use each value that is swept; got no {lr} in x '{seed}'"),
        (["x", "{lr:.3}"], {"lr": [1]}, "command must have a plain key in braces, as {lr}, and {{ for a brace; got {lr:.3}"),
        (["x", "{lr"], {"lr": [1]}, "command must have {key} for a value, and {{ for a brace; got {lr: "),
        (["x", "{run_dir}"], {"run_dir": [1]}, "configurations must leave run_dir to the launcher; got a value for it"),
    ],
)
def test_a_command_whose_keys_do_not_fit_is_one_line(command: list[str], values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011, the text is compared
        CommandTask(command, values, objective="loss")
    assert str(raised.value).startswith(said)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["no-such-program"], "command must begin with a program that is there; got no-such-program, which is neither in"),
        (["python", "train.py"], "command must name a script that is there; got train.py, which is not in"),
        (["bash", "train.sh"], "command must name a script that is there; got train.sh, which is not in"),
        (["./train"], "command must begin with a program that can be run; got ./train: chmod"),
    ],
)
def test_a_missing_program_is_one_line(words: list[str], said: str, tmp_path: Path) -> None:
    (tmp_path / "train").touch()
    with pytest.raises(ValueError) as raised:  # noqa: PT011, the text is compared
        CommandTask(words, {}, objective="loss").check_program(tmp_path)
    assert str(raised.value).startswith(said)


def test_keys_get_the_types_of_all_that_they_may_be() -> None:
    spec = SweepSpec(
        command=["true", "{lr}", "{depth}", "{on}", "{kind}", "--n={n}", "{{x}}"],
        space=[real("lr", 1, 2), whole("depth", 1, 3), choice("on", True, False), choice("kind", "a", "b")],
        defaults={"n": 3},
        objective="loss",
    )
    task = spec.own_task
    assert task is not None
    assert {k: v for k, v in vars(task.Config()).items() if k not in ("command", "epochs")} == {
        "seed": 42,
        "lr": 1.0,
        "depth": 1,
        "on": True,
        "kind": "a",
        "n": 3,
    }
    assert isinstance(task, CommandTask)
    assert task.line(task.Config(), Path("/r"), Path("/"), Path("/"))[1:] == ["1.0", "1", "true", "a", "--n=3", "{x}"]
    assert placeholders(["{{x}}", "a{b}c{d}"]) == ["b", "d"]
    assert [written(v) for v in (True, 0.5, "x")] == ["true", "0.5", "x"]


def test_a_sweep_has_a_task_or_a_command_and_seeds_that_reach_it() -> None:
    with pytest.raises(ValueError, match=r"^a sweep must have a task or a command; got both"):
        SweepSpec(command=["true"], task="x", objective="y").resolved()
    of_commands = {"unit": "%", "version": "2", "files": ["x"], "direction": "minimize", "defaults": {"lr": 1}, "grace_seconds": 0}
    for name, value in of_commands.items():
        remedy = "leave it out" if name in ("defaults", "grace_seconds") else "give it to the PlainTask"
        with pytest.raises(ValueError, match=rf"^{name} must come with a command; got {re.escape(repr(value))} without one: {remedy}$"):
            SweepSpec(**{name: value}).resolved()  # type: ignore[arg-type]
    assert SweepSpec(files=[], defaults={}).own_task is None
    with pytest.raises(ValueError, match=r"^grace_seconds must be a number of seconds, at least 0; got -1$"):
        SweepSpec(command=["true"], objective="y", grace_seconds=-1).resolved()
    task = SweepSpec(command=["true", "{lr}"], configurations=[Configuration({"lr": 1})], objective="y").own_task
    assert task is not None
    task.check_seeds(1)
    with pytest.raises(ValueError, match=r"^command must use \{seed\} where there is more than one; got 2 seeds for true"):
        task.check_seeds(2)
    with pytest.raises(ValueError, match=r"^cluster\.ranks_per_trial must be 1 for a command"):
        task.validate(task.Config(), 2)
    assert no_judge(1, {}) == ""


def test_of_epoch_and_step_the_one_that_the_run_counts_says_how_far_it_is() -> None:
    line = b'{"epoch": 3, "step": 1200, "loss": 0.5}'
    assert parsed(line, "epoch") == (3, {"loss": 0.5})
    assert parsed(line, "step") == (1200, {"loss": 0.5})
    assert parsed(b'{"step": 7, "loss": 0.5}', "epoch") == (7, {"loss": 0.5})


def test_a_word_that_is_too_long_for_a_file_name_is_a_text(tmp_path: Path) -> None:
    task = CommandTask(["bash", "-c", "echo of a loop; " * 30], {}, objective="loss")
    task.check_program(tmp_path)
    assert task.program_words(tmp_path) == []
    with pytest.raises(ValueError, match=r"^command must name a script that is there; got xxx"):
        CommandTask(["bash", "x" * 300], {}, objective="loss").check_program(tmp_path)


def test_words_of_python_are_no_keys_and_a_text_is_no_list_of_words() -> None:
    with pytest.raises(ValueError, match=r"^command must have keys that are no words of Python; got \{lambda\}: write \{lambda_\}$"):
        placeholders(["--lambda", "{lambda}"])
    with pytest.raises(ValueError, match=r"^command must be a list of texts; got the text 'python t.py': write \['python t.py'\]$"):
        CommandTask("python t.py", {}, objective="loss")
    with pytest.raises(ValueError, match=r"^headline must be a list of texts; got the text 'acc'"):
        CommandTask(["true"], {}, objective="loss", headline="acc")


def test_a_module_and_what_it_imports_from_its_package_are_files_of_the_program(tmp_path: Path) -> None:
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__init__.py").write_text("")
    (tmp_path / "pkg" / "train.py").write_text("from pkg.model import x\n")
    (tmp_path / "pkg" / "model.py").write_text("x = 1\n")
    task = CommandTask(["python", "-m", "pkg.train"], {}, objective="loss")
    files = {path for word, base in task.program_words(tmp_path) for path in with_imports(word, base)}
    assert {path.name for path in files} == {"__init__.py", "train.py", "model.py"}
    assert task.module == "pkg.train"
