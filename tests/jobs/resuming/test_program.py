"""`python -m jobs.drill --task` and `--command`: reports, exit statuses and refusals."""

import functools
import json
import sys
from pathlib import Path

import pytest

from jobs import drill
from jobs.config import compose_job
from jobs.resuming import program
from jobs.resuming.check import Disturbed, Findings
from jobs.resuming.runs import Runs
from jobs.resuming.watch import Moment
from tests.support.documented import typed
from tests.support.drilled import start
from tests.support.forgetting import BUGS
from tests.support.killed_run import EXAMPLES

# Goes on at its number and forgets its sum, unless it reads it again.
_COUNT = """
n=$(cat "$1/n" 2>/dev/null || echo 0); sum=0
if [ -n "$READS" ]; then sum=$(cat "$1/sum" 2>/dev/null || echo 0); fi
while [ "$n" -lt 6 ]; do
  n=$((n + 1)); sum=$((sum + n))
  echo "{\\"step\\": $n, \\"sum\\": $sum}" >> "$SWEEP_REPORT"
  echo "$sum" > "$1/sum.new"; echo "$n" > "$1/n.new"
  mv "$1/sum.new" "$1/sum"; mv "$1/n.new" "$1/n"
  sleep 0.1
done
"""
_FAILS = "an undisturbed run must complete; got a failure:"


@pytest.mark.slow
def test_a_task_that_forgets_a_generator_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    [bug] = [b for b in BUGS if b.name == "a generator of Python's"]
    bug.write(tmp_path)
    (tmp_path / "logistic.py").rename(tmp_path / "my_training.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(program, "Runs", functools.partial(Runs, start=start))
    words = typed("python -m jobs.drill --task my_training:TASK epochs=6", {})
    assert drill.main([*words[3:], "--kills", "1", "--json"]) == 1
    sys.modules.pop("my_training", None)
    found = json.loads(capsys.readouterr().out)
    assert [(c["kind"], c["name"], c["proved"]) for c in found["forgotten"]] == [("Python random state", "draw", True)]
    assert "setstate()" in found["forgotten"][0]["fix"]
    assert found["disturbed"][0]["first"]["name"] == "error"


@pytest.mark.slow
@pytest.mark.parametrize("reads", [False, True])
def test_the_first_metric_and_step_of_a_command_that_differ_are_named(
    reads: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.sh").write_text(_COUNT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("READS", "yes" if reads else "")
    words = typed("python -m jobs.drill --command 'sh train.sh {run_dir}'", {})
    status = drill.main([*words[3:], "--kills", "1", "--seed", "3"])
    said = capsys.readouterr().out
    assert status == (0 if reads else 1), said
    assert ("NOTHING IS FORGOTTEN" in said) == reads
    assert reads or "\n  first     sum, reported at " in said


_SWEEP = """
from dataclasses import dataclass
from sweeps import Configuration, PlainTask, Scale, SweepSpec
@dataclass
class Config:
    lr: float = 1.0
    depth: int = 1
    epochs: int = 9
    seed: int = 42
TASK = PlainTask(Config, lambda config, run: None, objective="loss")
SWEEP = SweepSpec(task=TASK, configurations=[Configuration({"lr": 0.5}), Configuration({"lr": 2.0})], smoke=Scale(["depth=3"], 1))
"""


def test_a_sweep_s_file_is_drilled_with_the_values_of_its_first_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[Runs] = []

    def check(runs: Runs, *_: object) -> Findings:
        ran.append(runs)
        return Findings(disturbed=[Disturbed(Moment(1, 0), False)])

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a_sweep_to_drill.py").write_text(_SWEEP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(program, "check", check)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "")
    words = typed("python -m jobs.drill --task my_sweep.py epochs=6", {"my_sweep.py": "mine/a_sweep_to_drill.py"})
    assert drill.main(words[3:]) == 0, capsys.readouterr().err
    assert ran[0].task == "a_sweep_to_drill:TASK"
    assert ran[0].path == [str(tmp_path / "mine")]
    config = compose_job(ran[0].overrides, ran[0].task).train
    assert (config.lr, config.depth, config.epochs) == (0.5, 3, 6)
    sys.modules.pop("a_sweep_to_drill")


@pytest.mark.slow
def test_the_command_of_a_sweep_s_file_is_drilled_in_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "")
    own = drill.of_sweep(str(EXAMPLES / "shell_walk.py"), ["epochs=7"])
    assert (own.folder, own.command and own.command.values["step"], own.command and own.command.values["epochs"]) == (EXAMPLES, "20", "7")
    assert drill.main(["--task", str(EXAMPLES / "shell_walk.py"), "--kills", "2", "epochs=7"]) == 0
    assert "NOTHING IS FORGOTTEN: 2 disturbed runs equal the undisturbed one, in 7 reports" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--kills", "2"], "--kills must be given with --task or --command; got neither"),
        (["--task", "a:B", "--command", "c"], "--task must be left out with --command; got both"),
        (["--task", "a:B", "--dry-run"], "--cluster and --dry-run must be left out"),
        (["--task", "no_such_module:TASK"], "task must be a module that can be imported; got no_such_module"),
        (["--task", "no_such_file.py"], "--task must be a file of Python; got no_such_file.py: there is no such file"),
        (["--command", "sh {lr}"], "--command must have a value for each {key}; got none for {lr}: add lr=VALUE"),
        (["--command", "true", "--kills", "0"], "--kills must be at least 1; got 0"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert drill.main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message}")
    assert said.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("false", f"{_FAILS} the command must end with status 0; got exit 1: no output"),
        ("sh -c 'echo no data; exit 3'", f"{_FAILS} the command must end with status 0; got exit 3: no data"),
        ("sh -c 'exit 75'", f"{_FAILS} the command must gain an epoch before it stops by itself; got exit 75 twice at 0"),
        ("true", "a command must report at least twice"),
    ],
)
def test_a_command_that_cannot_be_drilled_says_why(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert drill.main(["--command", line]) == 1
    assert capsys.readouterr().err.startswith(f"error: {message}")
