"""A name, a path or a profile's value reaches the batch script's end as it is, or is refused: none of it is run by a shell."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.cluster import ClusterProfile, require_sbatch_path, validate_cluster
from jobs.config import compose_job
from jobs.private import make_private, refuse_unless_private
from jobs.provenance import scrubbed
from jobs.slurm.queue import SlurmError
from jobs.slurm.sbatch import Array, _hydra_value, launcher_overrides, render
from sweeps.cli import run
from sweeps.predictor_ablation import SWEEP
from tests.support.slurm_bench import needs_slurm
from tests.support.slurm_cluster import SlurmCluster

# Each would leave a file named `pwned` behind wherever a shell read it as code.
HOSTILE = [
    "$(touch pwned)",
    "`touch pwned`",
    "; touch pwned",
    "a; touch pwned #",
    "' ; touch pwned; '",
    '" ; touch pwned; "',
    "| touch pwned",
    "&& touch pwned",
    "> pwned",
    "a\ntouch pwned",
    "a\r\ntouch pwned",
    "a\n#SBATCH --uid=0",
    "${IFS}touch${IFS}pwned",
    "\\\ntouch pwned",
    "--wrap=touch pwned",
    "-x",
    "--help",
    "a b",
    "ünïcödé 日本",
    "\u202etxt",
    "%j %A",
    "*",
    "~root",
    "!!",
    "a'b\"c",
    "a=b,c(d)[e]{f}~g",
    "\x1b[31m",
]
SLURM = compose_job(["cluster=test_cluster", "device=cpu"]).cluster
# The rank's stand-in: writes down what it was given.
STAND_IN = "import json, os, sys; json.dump([sys.argv, os.getcwd(), os.environ['PYTHONPATH']], open(os.environ['SEEN'], 'w'))"


def run_script(text: str, tmp_path: Path, name: str = "job.sh") -> tuple[int, str]:
    """Run a batch script as slurmd would, with a supervisor and a rank that write down their arguments."""
    (tmp_path / name).write_text(text)
    syntax = subprocess.run(["bash", "-n", str(tmp_path / name)], capture_output=True, text=True, check=False)
    assert syntax.returncode == 0, syntax.stderr
    environment = {"PATH": os.environ["PATH"], "SEEN": str(tmp_path / "seen")}
    done = subprocess.run(["bash", str(tmp_path / name)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert not list(tmp_path.rglob("pwned")), text
    return done.returncode, done.stdout + done.stderr


def refusal(check: Callable[[], None]) -> str:
    """The one line with which `check` refuses, "" where it does not."""
    try:
        check()
    except ValueError as refused:
        said = str(refused)
    else:
        return ""
    assert "\n" not in said
    return said


def rendered(cluster: ClusterProfile, array: Array) -> str:
    """The script, whose Python is a stand-in."""
    return render(cluster, array, python=str(array.code / "python"))


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_a_path_arrives_as_it_is_or_is_refused(name: str, tmp_path: Path) -> None:
    runs = tmp_path / name.replace("/", "_")
    if said := refusal(lambda: require_sbatch_path(runs, "--runs-dir")):
        assert said.startswith("--runs-dir must not contain ")
        return
    code = runs / "code"
    code.mkdir(parents=True)
    (code / "python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -c {shlex.quote(STAND_IN)} "$@"\n')
    (code / "python").chmod(0o755)
    array = Array(
        "sweep-1", 2, 1, "sweeps.execution.worker_main", str(runs / "submissions" / "1.json"), code, runs / "log", f"2 workers of {runs}"
    )
    status, said = run_script(rendered(SLURM, array), tmp_path)
    assert status == 0, said
    arguments, where, path = json.loads((tmp_path / "seen").read_text())
    assert arguments[-1] == str(runs / "submissions" / "1.json")
    assert where == str(code)
    assert path.split(":")[0] == str(code)


@pytest.mark.parametrize("key", ["account", "partition", "qos", "gres"])
@pytest.mark.parametrize("value", HOSTILE, ids=ascii)
def test_what_slurm_calls_by_name_is_a_word_or_refused(key: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"^cluster.{key} must be a word") as refused:
        validate_cluster(replace(SLURM, **{key: value}))
    assert "\n" not in str(refused.value)


def test_ordinary_names_are_taken() -> None:
    for key, value in {"account": "p_abc.2", "partition": "gpu,ai", "qos": "lowpri", "gres": "gpu:a100:4(S:0-1)"}.items():
        validate_cluster(replace(SLURM, **{key: value}))


@pytest.mark.parametrize("value", HOSTILE, ids=ascii)
def test_further_sbatch_options_stay_in_their_line(value: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^cluster\.sbatch must have long options"):
        validate_cluster(replace(SLURM, sbatch={value: "x"}))
    cluster = replace(SLURM, sbatch={"constraint": value})
    if not value.isprintable():
        with pytest.raises(ValueError, match=r"^cluster\.sbatch\.constraint must be one line of printable text"):
            validate_cluster(cluster)
        return
    validate_cluster(cluster)
    script = rendered(cluster, Array("s-1", 1, 1, "m", "argument", tmp_path, tmp_path))
    (line,) = [x for x in script.splitlines() if x.startswith("#SBATCH --constraint=")]
    assert shlex.split(line.removeprefix("#SBATCH --constraint="), comments=False) == [value]
    run_script(script, tmp_path)


@pytest.mark.parametrize("value", HOSTILE, ids=ascii)
def test_a_containers_words_are_words_and_no_shell(value: str, tmp_path: Path) -> None:
    cluster = replace(SLURM, python=value)
    if said := refusal(lambda: validate_cluster(cluster)):
        assert "cluster.python must" in said
        return
    run_script(rendered(cluster, Array("s-1", 1, 1, "m", "argument", tmp_path, tmp_path)), tmp_path)


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_a_sweeps_name_names_a_folder_and_jobs(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a sweep's name must be") as refused:
        run.run(replace(SWEEP, name=name), ["--runs-dir", str(tmp_path), "--dry-run"])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["a\nb", "a#b", "a\\b", "a'b", "\x1b[31m"], ids=ascii)
def test_a_sweep_refuses_such_a_folder_before_anything_is_submitted(name: str, tmp_path: Path) -> None:
    on = ["--cluster", "test_cluster", "--scale", "smoke", "micro_batch_size=16", "--yes", "--detach"]
    with pytest.raises((ValueError, SlurmError), match="must") as refused:
        run.run(SWEEP, ["--runs-dir", str(tmp_path / name), *on])
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("value", [h for h in HOSTILE if h.isprintable()], ids=ascii)
def test_hydras_grammar_hands_a_value_on_as_it_is(value: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    assert OverridesParser.create().parse_override(f"x={_hydra_value(value)}").value() == value.replace("${", "\\${")


@needs_slurm
@pytest.mark.slow
@pytest.mark.xdist_group("slurm-2")
def test_a_real_sbatch_reads_a_path_as_it_is(tmp_path: Path, cluster: SlurmCluster) -> None:
    """Spaces, a command in $() and in backticks, percent signs, unicode and a leading dash."""
    runs = tmp_path / "-a b $(touch pwned) `touch pwned` %j 100% ü;|& c=d,e(f)~[g]{h}"
    require_sbatch_path(runs, "runs_dir")
    (runs / "log").mkdir(parents=True)
    code = runs / "code"
    code.mkdir()
    (code / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\npwd\n')
    (code / "python").chmod(0o755)
    profile = replace(SLURM, sbatch={"comment": "$(touch pwned)"})
    array = Array("sweep-1", 1, 1, "m", str(runs / "1.json"), code, runs / "log", f"workers of {runs}")
    (tmp_path / "job.sh").write_text(rendered(profile, array))
    job = cluster.run("sbatch", "--parsable", str(tmp_path / "job.sh")).strip()
    shown = cluster.run("scontrol", "show", "job", job)  # before Slurm forgets it
    log = runs / "log" / f"{job}_0.log"
    cluster.wait("the job's log", lambda: log.exists() and str(code) in log.read_text(), 90)
    lines = log.read_text().splitlines()
    assert lines[-1] == str(code)
    assert str(runs / "1.json") in lines
    assert "Comment=$(touch pwned)" in shown
    assert not list(tmp_path.rglob("pwned"))


# Folders of pickles.


def test_the_folder_of_pickles_is_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        make_private(tmp_path / "a" / "b", "k")
        assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
        (tmp_path / "a" / "b").chmod(0o755)
        make_private(tmp_path / "a" / "b", "k")
        assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(before)


def planted(tmp_path: Path) -> list[Path]:
    """Folders that somebody else may have written into, or owns."""
    wide, link, file = tmp_path / "wide", tmp_path / "link", tmp_path / "file"
    wide.mkdir()
    wide.chmod(0o777)
    (tmp_path / "own").mkdir(mode=0o700)
    link.symlink_to(tmp_path / "own")
    file.touch()
    found = [wide, link, file]
    if os.getuid() == 0:
        (tmp_path / "theirs").mkdir(mode=0o700)
        os.chown(tmp_path / "theirs", 12345, 12345)
        found.append(tmp_path / "theirs")
    return found


def test_a_folder_that_others_can_write_is_refused_before_and_within_the_job(tmp_path: Path) -> None:
    for folder in planted(tmp_path):
        with pytest.raises(ValueError, match="k must be a folder of this user that nobody else can write; got"):
            make_private(folder, "k")
        done = subprocess.run(["bash", "-c", f"{refuse_unless_private(folder)}\necho read"], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (1, ""), folder
        assert "must be private" in done.stderr
    mine = tmp_path / "it's $(mine)"
    make_private(mine, "k")
    done = subprocess.run(["bash", "-c", f"{refuse_unless_private(mine)}\necho read"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "read\n")


def test_jobs_of_the_launcher_check_the_folder_first(tmp_path: Path) -> None:
    setup = next(o for o in launcher_overrides(SLURM, "submitit_slurm", "n", tmp_path) if o.startswith("hydra.launcher.setup="))
    assert setup.removeprefix("hydra.launcher.setup=").startswith(_hydra_value([refuse_unless_private(tmp_path)])[:-1])


# Secrets.


@pytest.mark.parametrize(
    ("word", "recorded"),
    [
        ("api_key=abc", "api_key=***"),
        ("--hf-token=hf_abc", "--hf-token=***"),
        ("+env.WANDB_API_KEY: abc", "+env.WANDB_API_KEY:***"),
        ("db.password=a b", "db.password=***"),
        ("https://me:abc@host/x", "https://me:***@host/x"),
        ("optimizer.lr=0.1", "optimizer.lr=0.1"),
        ("data.root=/data/https://x", "data.root=/data/https://x"),
    ],
)
def test_command_lines_are_recorded_without_secrets(word: str, recorded: str) -> None:
    assert scrubbed(word) == recorded
