"""A text of a key=value means what was typed, whatever its characters, or one line shows the quoting that works."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cnnjepa.run.folder import RunFolder, RunStatus
from cnnjepa.run.identity import DEFAULT_TASK
from jobs import config
from jobs.config import as_typed, compose_job, override_keys, qualified, split_multirun
from jobs.pretrain import checked_multirun
from jobs.task import task_named
from sweeps.cli.plan import parse, plan
from sweeps.mask_ratio import SWEEP
from tests.jobs.test_pretrain import pretrain
from tests.support import forked
from tests.support.images import image_tree
from tests.support.packing import run as pack
from tests.support.scored import SMALL, score

ROOT = Path(__file__).parents[2]
TASK = task_named(DEFAULT_TASK)
ODD = ["a=b", "a,b", "a(b", "a)b", "a (b), c", "#a", "a#b", "a~b", "a b", "a  b ", "a[0]", "]a[", "{a: b}", "it's", 'a"b', "'a'b", "a'"]
ODD += [
    "a\\b",
    "a:b",
    "a&b",
    "a|b;c",
    "100%",
    "$a",
    "a@b",
    "*?!",
    "range(1,3)",
    "choice(a,b)",
    "a==b",
    "-a",
    "+a",
    "ü 日本",
    "007",
    "null",
    "1e3",
]


@pytest.mark.parametrize("name", ODD)
def test_a_text_is_taken_as_typed(name: str) -> None:
    path = f"/x/{name}"
    job = compose_job([f"{key}={path}" for key in ("data.root", "run_dir", "runs_dir", "data_root", "local_scratch")])
    assert (job.train.data.root, str(job.run_dir)) == (path, path)
    assert (job.cluster.runs_dir, job.cluster.data_root, job.cluster.local_scratch) == (path, path, path)
    assert compose_job([f"data.root={name}"]).train.data.root == name
    if "," not in name:
        entries = compose_job([f"probes.data=[digits, imagefolder:{path}]", f"setup=[{path}]"])
        assert entries.train.probes.data == ["digits", f"imagefolder:{path.strip()}"]
        assert entries.cluster.setup == [path.strip()]


@pytest.mark.parametrize("name", ODD)
def test_quotes_that_a_user_types_still_work(name: str) -> None:
    for quote in "'\"":
        inner = name.replace(quote, f"\\{quote}")
        job = compose_job([f"data.root={quote}/x/{inner}{quote}", f"probes.data=[{quote}imagefolder:/x/{inner}{quote}]"])
        assert job.train.data.root == f"/x/{name}"
        assert job.train.probes.data == [f"imagefolder:/x/{name}"]


def test_references_to_other_keys_still_work() -> None:
    job = compose_job(["data.root=/x/(${seed})", "seed=7", "run_dir='/y=${epochs}'", "data_root=/x/\\${seed}"])
    assert (job.train.data.root, str(job.run_dir), job.cluster.data_root) == ("/x/(7)", "/y=200", "/x/${seed}")


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (r"data.root=/a\ b", "data.root must be in quotes where a backslash stands before one of "),
        (r"run_dir=/a\,b", "run_dir must be in quotes where a backslash stands before one of "),
        (r"probes.data=[imagefolder:/a\=b]", "probes.data must be in quotes where a backslash stands before one of "),
    ],
)
def test_an_escape_outside_quotes_is_refused_with_the_quoting_that_keeps_it(override: str, line: str) -> None:
    with pytest.raises(ValueError, match=re.escape(line)) as refused:
        compose_job([override])
    if "[" not in override:
        (shown,) = shlex.split(str(refused.value).partition("write ")[2])
        typed = compose_job([shown])
        assert override.partition("=")[2] in (typed.train.data.root, str(typed.run_dir))


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("data.root=/a${b}", r"data.root must fit the configuration; got /a${b}: Interpolation key 'b' not found: write \${ where ${"),
        ("run_dir=/a${", r"run_dir must fit the configuration; got /a${: no viable alternative at input '${': write \${ where ${"),
        ("data={root: /a (b)}", "got data={root: /a (b)}: put text in quotes, as in 'key=\"a (b)\"'"),
        ("probes.data=[imagefolder:/a,b]", "and ROOT an absolute path; got b: put an entry that holds a comma in quotes"),
        ("probes.data=imagefolder:/a b", "probes.data must "),
    ],
)
def test_what_cannot_be_taken_so_is_one_line_with_what_to_write(override: str, line: str) -> None:
    with pytest.raises(ValueError, match=re.escape(line)) as refused:
        compose_job([override])
    assert "\n" not in str(refused.value)


def test_sbatch_options_are_texts_unless_they_are_true_false_or_null() -> None:
    options = {
        "constraint": "a100&nvlink",
        "exclude": "gpu[01-02]",
        "comment": "a (b), c=d #e",
        "licenses": "x:2,y",
        "nice": "5",
        "overcommit": True,
    }
    typed = [f"sbatch.{key}={str(value).lower() if value is True else value}" for key, value in options.items()]
    found = compose_job([*typed, "sbatch.reservation='5'"]).cluster.sbatch
    assert found == {**options, "reservation": "5"}
    assert [type(found[key]) for key in ("nice", "overcommit", "reservation")] == [str, bool, str]


def test_every_key_of_type_str_is_found_by_its_type() -> None:
    typed = {key for key in override_keys() if as_typed(f"{key}=a (b)", TASK) == f"{key}='a (b)'"}
    assert {"data.root", "run_dir", "cluster.python", "cluster.account", "method.name"} <= typed
    assert not typed & {"epochs", "optimizer.lr", "data.name", "probes.names", "cluster.max_parallel", "data", "method"}


# Homes.


def test_a_home_is_filled_in_where_a_key_is_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    job = compose_job(["data.root=~/a b", "run_dir=~", "runs_dir=~/r", "data_root='~/d'", "local_scratch=~/s", "setup=[cd ~/x]"])
    assert (job.train.data.root, job.run_dir) == (f"{tmp_path}/a b", tmp_path)
    assert (job.cluster.runs_dir, job.cluster.data_root, job.cluster.local_scratch) == tuple(f"{tmp_path}/{name}" for name in "rds")
    assert job.cluster.setup == ["cd ~/x"]  # the shell's
    assert compose_job(["data.root=/x/~/y"]).train.data.root == "/x/~/y"
    assert compose_job(["data.root=./~"]).train.data.root == "./~"
    sweep, _ = plan(SWEEP, parse(SWEEP, ["--dry-run", "--runs-dir=~/a (b)"]))
    assert sweep.path.parent == tmp_path / "a (b)"


def test_a_home_in_a_profile_is_filled_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copytree(config.CONFIG_DIR, tmp_path / "slurm")
    monkeypatch.setattr(config, "CONFIG_DIR", tmp_path / "slurm")
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "slurm" / "cluster" / "mine.yaml").write_text("name: mine\nruns_dir: ~/runs, old\ndata_root: ~/data\n")
    cluster = compose_job(["cluster=mine"]).cluster
    assert (cluster.runs_dir, cluster.data_root) == ("/home/me/runs, old", "/home/me/data")


# Several values.


@pytest.mark.parametrize(
    ("override", "values"),
    [
        ("data.root=/a (1),/b=2", ["/a (1)", "/b=2"]),
        ("data.root='/a,b', \"/c,d\"", ["/a,b", "/c,d"]),
        ("data.root=/a#b", ["/a#b"]),
        ("data.root=choice(/a,/b)", ["/a", "/b"]),
        ("data.root=/a/${oc.env:NO_SUCH,x},/b", ["/a/x", "/b"]),
        ("account=007,x@y", ["007", "x@y"]),
    ],
)
def test_a_comma_separates_values_of_a_multirun(override: str, values: list[str]) -> None:
    jobs = [compose_job(job) for job in split_multirun(qualified([override]))]
    assert [job.train.data.root or job.cluster.account for job in jobs] == values
    numbers = split_multirun(["seed=1,2", "probes.names=[knn],[linear,knn]", "cluster.sbatch.exclude=gpu01,gpu02"])
    assert len(numbers) == 4


@pytest.mark.parametrize("root", ["/a (b), c", "/nowhere,/x=y"])
def test_a_multirun_that_a_comma_breaks_shows_the_quoting_that_works(root: str) -> None:
    given = [*SMALL, f"data.root={root}"]
    with pytest.raises(ValueError, match=r"data\.root must hold imagefolder .*; with --multirun a comma separates values") as refused:
        checked_multirun(given)
    (shown,) = shlex.split(str(refused.value).rpartition("write ")[2])
    assert [compose_job(job).train.data.root for job in split_multirun([shown])] == [root]


# What runs there.

EVERYTHING = "a b=c,d(e)#f~g[h]{i}'j\"k&l;m%n$o!p*q"


def test_a_run_and_its_images_may_lie_anywhere(tmp_path: Path) -> None:
    """Packed, staged, trained with TensorBoard, and scored on other images."""
    odd = tmp_path / EVERYTHING
    tree, run = image_tree(odd / "tree", ["ant", "bee"], images=12), odd / "run"
    assert pack(tree, odd / "packed").returncode == 0
    (odd / "scratch").mkdir()
    words = [*SMALL, "epochs=1", "optimizer.warmup_epochs=0", "log.tensorboard=true", f"data.root={odd / 'packed'}", f"run_dir={run}"]
    done = pretrain([*words, f"local_scratch={odd / 'scratch'}"])
    assert done.returncode == 0, done.stderr
    assert f"completed: {run}" in done.stdout
    assert f"copied to {odd / 'scratch'}" in done.stdout
    assert list((run / "tensorboard").iterdir())
    entry = f"imagefolder:{tree}".replace("'", "\\'")
    status, out, err = score(run, f"data.root={odd / 'packed'}", f"probes.data=['{entry}']")
    assert status == 0, out + err
    assert "knn.imagefolder.test_top1 = " in out


def test_hydra_itself_gets_what_was_typed(tmp_path: Path) -> None:
    """It reads the command line of a multirun, and where the configuration is shown."""
    runs = tmp_path / EVERYTHING.replace(",", "")
    done = pretrain(["-m", *SMALL[1:], "epochs=1", "optimizer.warmup_epochs=0", "data=digits", "data.train_limit=64", f"runs_dir={runs}"])
    assert done.returncode == 0, done.stderr
    (run,) = (runs / "single").iterdir()
    assert RunFolder(run).result().status is RunStatus.completed  # type: ignore[union-attr]
    shown = pretrain(["--cfg", "job", "-p", "data", f"data.root=/x/{EVERYTHING}"])
    assert shown.returncode == 0, shown.stderr
    assert yaml.safe_load(shown.stdout)["root"] == f"/x/{EVERYTHING}"


@pytest.mark.parametrize(
    "words", [["epochs=7", "-c", "job"], ["-c", "job", "epochs=7"], ["epochs=7", "-p", "optimizer", "--cfg", "job", "data=digits"]]
)
def test_options_stand_wherever_they_are_typed(words: list[str]) -> None:
    shown = pretrain(words)
    assert shown.returncode == 0, shown.stderr
    values = yaml.safe_load(shown.stdout)
    assert values["lr"] if "-p" in words else values["epochs"] == 7


def test_a_sweep_may_lie_anywhere(tmp_path: Path) -> None:
    runs = tmp_path / EVERYTHING
    for words in (["--runs-dir", str(runs)], [f"runs_dir={runs}"]):
        done = forked.run([str(ROOT / "sweeps" / "mask_ratio.py"), "--dry-run", "--seeds", "1", *words])
        assert done.returncode == 0, done.stderr
        assert f"epochs each, in {runs}/mask_ratio-smoke" in done.stdout
    refused = forked.run([str(ROOT / "sweeps" / "mask_ratio.py"), "--dry-run", "--cluster", "test_cluster", "--runs-dir", str(runs)])
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: --runs-dir must not contain '\"' '#' \"'\" on Slurm")
    assert refused.stderr.rstrip().endswith("choose a folder without them")


@pytest.mark.nightly
def test_a_sweep_runs_to_its_report_in_such_a_folder(tmp_path: Path) -> None:
    runs = tmp_path / EVERYTHING
    folder = runs / "tiny_sweep-smoke"

    def said(*words: object) -> str:
        done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    said(ROOT / "tests" / "support" / "tiny_sweep.py", "--seeds", 1, "--runs-dir", runs)
    assert "3 completed of 3 trials" in said("-m", "sweeps", "status", folder)
    assert said("-m", "sweeps", "report", folder) == f"{folder / 'report.html'}\n"
    assert shlex.split(said("-m", "sweeps", "study", folder)) == ["optuna-dashboard", str(folder / "optuna.journal")]
    assert said("-m", "jobs.probe", folder).count("nothing to do, all scores are there") == 3


def test_commands_that_are_printed_to_be_copied_quote_their_folders() -> None:
    commands = [
        (file.name, found[1])
        for part in ("cnnjepa", "jobs", "sweeps")
        for file in (ROOT / part).rglob("*.py")
        for found in re.finditer(r"python -m [\w.|-]+(?: [\w.|-]+)* \{([^}]*)\}", file.read_text())
    ]
    assert len(commands) >= 6
    assert [c for c in commands if not c[1].startswith(("shlex.quote(", "named(")) and c[1] != "_FOLDER"] == []
