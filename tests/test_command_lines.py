"""Every command line of the project: no option may be shortened, and a mistake is one line that says what to write instead."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import drill, pretrain
from jobs.cli import Parser
from sweeps.cli.plan import parse
from sweeps.joint_search import SWEEP as SEARCH
from sweeps.predictor_ablation import SWEEP
from tests.support import forked
from tests.support.documented import PRIVATE

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = ("cnnjepa", "jobs", "sweeps")


def parsers_of(source: str, product: bool) -> tuple[int, list[int]]:
    """Return how many parsers a file makes, and the lines of those that allow, or may allow, abbreviations."""
    made, wrong = 0, []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id if isinstance(node.func, ast.Name) else ""
        if name not in ("ArgumentParser", "Parser"):
            continue
        made += 1
        said = [k.value for k in node.keywords if k.arg == "allow_abbrev"]
        never = all(isinstance(v, ast.Constant) and v.value is False for v in said)
        if not never or (name == "ArgumentParser" and (product or not said)):
            wrong.append(node.lineno)
    return made, wrong


def test_no_parser_of_the_project_allows_abbreviations() -> None:
    made, wrong = 0, []
    for folder in (*PRODUCT, "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            count, lines = parsers_of(path.read_text(), folder in PRODUCT)
            made += count
            wrong += [f"{path.relative_to(ROOT)}:{line}" for line in lines]
    assert wrong == [], "use jobs.cli.Parser, and in tests allow_abbrev=False"
    assert made > 20
    assert not Parser(prog="x").allow_abbrev
    assert not Parser(prog="x").add_subparsers().add_parser("y").allow_abbrev


@pytest.mark.parametrize(
    ("source", "product", "lines"),
    [
        ("argparse.ArgumentParser()", False, [1]),
        ("argparse.ArgumentParser(allow_abbrev=True)", False, [1]),
        ("argparse.ArgumentParser(allow_abbrev=False)", False, []),
        ("argparse.ArgumentParser(allow_abbrev=False)", True, [1]),  # its mistakes would be several lines
        ("Parser()", True, []),
        ("Parser(allow_abbrev=shorten)", True, [1]),
    ],
)
def test_the_rule_can_be_broken(source: str, product: bool, lines: list[int]) -> None:
    assert parsers_of(source, product) == (1, lines)


OPTION = "must be an option listed by --help; got"
SWEEP_TABLE = [
    ("--seed 3", f"--seed {OPTION} --seed 3; did you mean --seeds?"),
    ("--seed=3", f"--seed {OPTION} --seed=3; did you mean --seeds?"),
    ("--early asha", f"--early {OPTION} --early asha; did you mean --early-stopping?"),
    ("--runs_dir x", f"--runs_dir {OPTION} --runs_dir x; did you mean --runs-dir?"),
    ("--epochs 5", f"--epochs {OPTION} --epochs 5; did you mean epochs=5?"),
    ("--epochs=5", f"--epochs {OPTION} --epochs=5; did you mean epochs=5?"),
    ("--epochs", f"--epochs {OPTION} --epochs; did you mean epochs=VALUE?"),
    ("--lr 0.1", f"--lr {OPTION} --lr 0.1; did you mean optimizer.lr=0.1?"),
    ("--account abc", f"--account {OPTION} --account abc; did you mean account=abc?"),
    ("--data digits", f"--data {OPTION} --data digits; did you mean data=digits?"),
    ("--fast epochs=5", f"--fast {OPTION} --fast"),
    ("-s 3", f"-s {OPTION} -s 3"),
    ("--q\nz", f"'--q\\nz' {OPTION} '--q\\nz'"),
    ("--seeds x", "--seeds must be of type int; got x"),
    ("--scale papr", "--scale must be one of smoke, paper; got papr; did you mean paper?"),
    ("--seeds", "the command line must match --help; got argument --seeds: expected one argument"),
]


@pytest.mark.parametrize(("line", "message"), SWEEP_TABLE, ids=[line for line, _ in SWEEP_TABLE])
def test_a_sweep_says_what_to_write_instead(line: str, message: str) -> None:
    with pytest.raises(ValueError, match="must") as said:
        parse(SWEEP, ["--dry-run", *line.split(" ")])
    assert str(said.value) == message


RENAMED_TABLE = [
    ("--points 4", "--points must be written --max-trials; got --points 4: write --max-trials 4"),
    ("--points=4", "--points must be written --max-trials; got --points=4: write --max-trials=4"),
    ("--engine ray", "--engine must be written --backend; got --engine ray: write --backend allocation"),
    ("--engine=ray", "--engine must be written --backend; got --engine=ray: write --backend allocation"),
    ("--engine array", "--engine must be written --backend; got --engine array: write --backend array"),
    ("--backend ray", "--backend must be one of array, allocation; got ray: write --backend allocation"),
    ("--slots-per-node 4", "--slots-per-node must be written --trials-per-node; got --slots-per-node 4: write --trials-per-node 4"),
]


@pytest.mark.parametrize(("line", "message"), RENAMED_TABLE, ids=[line for line, _ in RENAMED_TABLE])
def test_an_option_of_version_0_1_names_the_new_one(line: str, message: str) -> None:
    with pytest.raises(ValueError, match="must") as said:
        parse(SEARCH, line.split(" "))
    assert str(said.value) == message


def test_preflight_counts_workers(tmp_path: Path) -> None:
    done = forked.run(["-m", "jobs.preflight", "--slots", "4"], cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --slots must be written --workers; got --slots 4: write --workers 4\n"


def test_words_that_look_like_options_stay_values() -> None:
    assert parse(SWEEP, ["--seeds", "-1"]).seeds == -1
    assert parse(SEARCH, ["--budget-gpu-hours", "-.5"]).budget_gpu_hours == -0.5
    assert parse(SWEEP, ["--", "--epochs"]).overrides == ["--epochs"]


def test_a_single_run_and_a_drill_say_it_too() -> None:
    for line in (["--multi", "epochs=3"], ["-m", "--multi"]):
        with pytest.raises(ValueError, match=rf"^--multi {OPTION} --multi( epochs=3)?; did you mean --multirun\?$"):
            pretrain.command_line().parse_args(line)
    with pytest.raises(ValueError, match=rf"^--fault {OPTION} --fault 3; did you mean --faults\?$"):
        drill.parse(["--fault", "3"])


AS_PROCESSES = [
    (["-m", "sweeps", "stats", "x"], "COMMAND must be one of status, results, "),
    (["-m", "sweeps", "stats", "x"], "; got stats; did you mean status?"),
    (["-m", "sweeps", "status", "--jsn"], f"--jsn {OPTION} --jsn; did you mean --json?"),
    (["-m", "jobs.pretrain", "--epochs", "3"], f"--epochs {OPTION} --epochs 3; did you mean epochs=3?"),
    (["-m", "jobs.drill", "--fault=3"], f"--fault {OPTION} --fault=3; did you mean --faults?"),
    (["-m", "jobs.preflight", "--on"], f"--on {OPTION} --on; did you mean --on-node?"),
    (["-m", "jobs.stage", "--lst", "x"], f"--lst {OPTION} --lst x; did you mean --list?"),
    (["-m", "jobs.export", "--file", "x"], f"--file {OPTION} --file x"),
    (["-m", "jobs.slurm.supervisor", "--stop", "3", "--", "true"], f"--stop {OPTION} --stop 3; did you mean --stop-signal-seconds?"),
    (["-m", "cnnjepa.data.pack", "a", "b", "--skip"], f"--skip {OPTION} --skip; did you mean --skip-corrupt?"),
    (["-m", "cnnjepa.data.check", "a", "--dec"], f"--dec {OPTION} --dec; did you mean --decode?"),
]


@pytest.mark.parametrize(("words", "message"), AS_PROCESSES, ids=[" ".join(words[1:]) for words, _ in AS_PROCESSES])
def test_a_command_ends_with_one_line_and_status_2(words: list[str], message: str, tmp_path: Path) -> None:
    done = forked.run(words, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


# A command, the titles of its groups, and what of its help matters most.
HELP = [
    (
        ["sweeps/joint_search.py"],
        ["what to run", "where and how", "search", "cost limits"],
        "(default: 16 at smoke scale, 40 at paper scale)",
    ),
    (["sweeps/predictor_ablation.py"], ["what to run", "where and how", "early stopping", "cost limits"], "(default: local)"),
    (["-m", "sweeps"], ["commands"], "COMMAND --help"),
    *[(["-m", "sweeps", c], ["what to show"], "SWEEP_FOLDER") for c in ("report", "study")],
    *[(["-m", "sweeps", c], ["what to show", "how"], "SWEEP_FOLDER") for c in ("status", "results", "logs", "advice")],
    (["-m", "sweeps", "cancel"], ["what to stop"], "(default: all, and their queued jobs)"),
    (["-m", "jobs.pretrain"], ["what to run", "look, and run nothing"], "--multirun"),
    (["-m", "jobs.drill"], ["what to run", "where and how", "your own program, on this machine"], "(default: 20)"),
    (["-m", "jobs.preflight"], ["what to check", "where"], "(default: local)"),
    (["-m", "jobs.stage"], ["what to do, one of", "which sets"], "--free FOLDER"),
    (["-m", "jobs.export"], ["what to export"], "(default: RUN_DIR/backbone.safetensors)"),
    (["-m", "jobs.slurm.supervisor"], ["what to run"], "-- COMMAND"),
    (["-m", "cnnjepa.data.pack"], ["what to pack", "how images are stored", "how to run"], "(default: 95)"),
    (["-m", "cnnjepa.data.check"], ["what to check", "how"], "--decode"),
]


@pytest.mark.parametrize(("words", "groups", "said"), HELP, ids=[" ".join(words) for words, _, _ in HELP])
def test_help_is_grouped_and_ends_with_an_example(words: list[str], groups: list[str], said: str, tmp_path: Path) -> None:
    line = [str(ROOT / words[0])] if words[0].endswith(".py") else words
    done = forked.run([*line, "--help"], cwd=tmp_path, env={**os.environ, "COLUMNS": "120"})
    assert (done.returncode, done.stderr) == (0, "")
    titles = re.findall(r"(?m)^(\w.*):$", done.stdout)
    assert [t for t in titles if t not in ("options", "example", "examples")] == groups
    assert re.search(r"(?m)^examples?:\n  .*python ", done.stdout)
    assert "options:\n  -h, --help" in done.stdout
    assert said in " ".join(done.stdout.split())
    assert re.findall(rf"{PRIVATE}|\b(?:points?|hand|quoted|engine|told|door|twin)\b", done.stdout.lower()) == []
    assert all(len(line) <= 120 for line in done.stdout.splitlines())
    assert list(tmp_path.iterdir()) == []


def test_sweeps_alone_prints_help(tmp_path: Path) -> None:
    alone, asked = forked.run(["-m", "sweeps"], cwd=tmp_path), forked.run(["-m", "sweeps", "--help"], cwd=tmp_path)
    assert (alone.returncode, alone.stderr) == (0, "")
    assert (asked.returncode, asked.stderr) == (0, "")
    assert alone.stdout == asked.stdout
    for name in ("status", "results", "report", "logs", "cancel", "study", "advice"):
        assert re.search(rf"(?m)^    {name} +\S.*$", asked.stdout), name


def test_a_sweep_starts_nothing_at_an_option_that_it_does_not_have(tmp_path: Path) -> None:
    line = [sys.executable, str(ROOT / "sweeps" / "predictor_ablation.py"), "--seed", "3"]
    done = subprocess.run(
        line, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: --seed {OPTION} --seed 3; did you mean --seeds?\n"
    assert list(tmp_path.iterdir()) == []
