"""Files that are broken in any of a hundred ways end a command with status 2 and one line that names the file, and start nothing."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs import config, pretrain
from sweeps import __main__ as looking
from sweeps.cli import local, run
from sweeps.cli.plan import parse, plan
from sweeps.state import claims
from sweeps.state.folder import Sweep
from tests.support.fault_target import ARGUMENTS, SPECS
from tests.support.tiny import tiny_config

Capture = pytest.CaptureFixture[str]


def refused(main: Callable[[], object], line: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> str:
    """What a command says that ends with 2; it must be one line."""
    monkeypatch.setattr(sys, "argv", ["command", *line])
    capsys.readouterr()
    try:
        status = main()
    except SystemExit as end:
        status = end.code
    out, err = capsys.readouterr()
    assert status == 2, out + err
    assert len(err.strip().splitlines()) == 1, err
    assert err.startswith("error: ")
    assert " must " in err
    assert "; got " in err or ", got" in err
    assert "submitted" not in out
    return err


@pytest.fixture(autouse=True)
def _nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*_: object) -> int:
        raise AssertionError("it has started")

    monkeypatch.setattr(pretrain, "run_job", started)
    monkeypatch.setattr(local, "run_missing", started)


# Profiles: the text of slurm/cluster/broken.yaml.
PROFILES = {
    "empty": "",
    "a list": "- a\n- b\n",
    "a word": "broken\n",
    "a number": "17\n",
    "no name": "scheduler: local\n",
    "unclosed list": "name: broken\nsetup: [a\n",
    "unclosed quote": 'name: "broken\n',
    "tabs": "name: broken\n\tscheduler: local\n",
    "bad indentation": "name: broken\n scheduler: local\n",
    "a key twice": "name: broken\nscheduler: local\nscheduler: slurm\n",
    "unknown key": "name: broken\ncores: 3\n",
    "nonsense within": "name: {a: {b: [1, {c: 2}]}}\n",
    "unknown scheduler": "name: broken\nscheduler: pbs\n",
    "unknown device": "name: broken\ndevice: tpu\n",
    "a word for cores": "name: broken\ncores_per_trial: many\n",
    "half a core": "name: broken\ncores_per_trial: 0.5\n",
    "no cores": "name: broken\ncores_per_trial: 0\n",
    "fewer than no cores": "name: broken\ncores_per_trial: -4\n",
    "null cores": "name: broken\ncores_per_trial: null\n",
    "a list of cores": "name: broken\ncores_per_trial: [1]\n",
    "NaN memory": "name: broken\nmemory_gb_per_trial: .nan\n",
    "infinite memory": "name: broken\nmemory_gb_per_trial: .inf\n",
    "NaN GPUs": "name: broken\ngpus_per_trial: .nan\n",
    "negative GPUs": "name: broken\ngpus_per_trial: -1\n",
    "setup is no list": "name: broken\nsetup: module load x\n",
    "setup of lists": "name: broken\nsetup: [[a]]\n",
    "sbatch is a list": "name: broken\nscheduler: slurm\nsbatch: [a]\n",
    "sbatch of dicts": "name: broken\nscheduler: slurm\nsbatch: {constraint: {a: b}}\n",
    "sbatch option with a line": 'name: broken\nscheduler: slurm\nsbatch: {"a\\nb": c}\n',
    "sbatch value with a line": 'name: broken\nscheduler: slurm\nsbatch: {constraint: "a\\ntouch x"}\n',
    "account with a line": 'name: broken\nscheduler: slurm\naccount: "a\\ntouch x"\n',
    "account with a space": "name: broken\nscheduler: slurm\naccount: a b\n",
    "partition is a flag": "name: broken\nscheduler: slurm\npartition: --wrap=x\n",
    "python with half a quote": "name: broken\npython: singularity exec 'x\n",
    "required is unknown": "name: broken\nrequired: [nope]\n",
    "required is a number": "name: broken\nrequired: 3\n",
    "required is missing": "name: broken\nrequired: [account]\n",
    "no time": "name: broken\nscheduler: slurm\ntime_limit_minutes: 0\n",
    "a signal past the limit": "name: broken\nscheduler: slurm\nstop_signal_seconds: 99999\n",
    "an endless reference": "name: broken\nruns_dir: ${.runs_dir}\n",
    "a reference to nothing": "name: broken\nruns_dir: ${nowhere}\n",
    "a reference to the environment": "name: broken\nruns_dir: ${oc.env:NO_SUCH_VARIABLE}\n",
    "an unknown resolver": "name: broken\nruns_dir: ${shell:id}\n",
    "half a reference": "name: broken\nruns_dir: ${\n",
    "a Python object": "name: !!python/object/apply:os.system ['touch pwned']\n",
    "an unknown tag": "name: !thing broken\n",
    "an unknown anchor": "name: *thing\n",
    "two documents": "name: broken\n---\nname: broken\n",
    "defaults that are not there": "defaults: [nope]\nname: broken\n",
    "missing value": "name: ???\n",
    "control characters": 'name: broken\nruns_dir: "a\\x1bb"\n',
    "not UTF-8": b"name: br\xff\xfeoken\n",
    "zeros": b"\0" * 100,
    "an image": b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
}


# Where Hydra does not say more than that the command line cannot be composed.
NAMED_BY_THE_COMMAND = [
    *("a list", "setup of lists", "sbatch is a list", "half a reference"),
    *("defaults that are not there", "not UTF-8", "an image"),
]


@pytest.fixture
def profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "slurm"
    shutil.copytree(config.CONFIG_DIR, folder)
    monkeypatch.setattr(config, "CONFIG_DIR", folder)
    monkeypatch.chdir(tmp_path)
    return folder / "cluster" / "broken.yaml"


@pytest.mark.parametrize("text", PROFILES.values(), ids=PROFILES)
def test_a_broken_profile(text: str | bytes, profile: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, tmp_path: Path) -> None:
    profile.write_bytes(text if isinstance(text, bytes) else text.encode())
    said = refused(pretrain.main, ["cluster=broken", f"run_dir={tmp_path / 'run'}", "optimizer.warmup_epochs=0"], monkeypatch, capsys)
    named = re.match(r"error: (slurm/cluster/broken\.yaml|cluster\.(\w+)[\w.]*) must ", said)
    if text in [PROFILES[name] for name in NAMED_BY_THE_COMMAND]:
        assert named is None
        assert "; got cluster=broken " in said
        return
    assert named is not None
    assert named[2] is None or named[2] in str(text)  # the file, or one of its keys
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "pwned").exists()


def test_a_folder_in_place_of_a_profile(profile: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    profile.mkdir()
    assert "cluster" in refused(pretrain.main, ["cluster=broken"], monkeypatch, capsys)


# What a sweep's folder holds, broken.
TEXTS = {
    "empty": b"",
    "half": b'{"epoch": 1, "own',
    "zeros": b"\0" * 64,
    "not UTF-8": b"\xff\xfe\xfa",
    "null": b"null",
    "a number": b"17",
    "a list": b"[]",
    "a word": b'"word"',
    "another object": b'{"a": {"b": [1, null]}}',
    "no object": b"{}",
    "deep": b"[" * 100_000,
    "NaN": b'{"status": NaN, "epoch": NaN, "search": NaN, "trials": NaN, "number": NaN, "cluster": NaN}',
    "nonsense within": b'{"status": [], "epoch": {}, "owner": 3, "search": [], "trials": {"a": 1}, "params": 3, "driver": 1}',
}
COMMANDS = (["status"], ["results", "--format", "csv"], ["study"], ["cancel"])


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    """A search that has begun: one trial is claimed, another chosen."""
    spec = SPECS["search"]
    made, _ = plan(spec, parse(spec, ["--runs-dir", str(tmp_path), *ARGUMENTS["search"]]))
    made.write()
    first = made.trials[0]
    made.run(first).prepare(first.config)
    assert claims.claim(made.trial_dir(first), 1, "d", 0)
    assert made.search is not None
    assert made.register(made.search.trial(1, 1, {**first.params, "optimizer.lr": 0.002}, 42))
    return made


FILES = ("sweep.json", "result.json", "claim", "choice")


def file_of(sweep: Sweep, name: str) -> Path:
    trial = sweep.trial_dir(sweep.trials[0])
    parts = {"result.json": trial / "result.json", "claim": trial / "claim" / "000001.json", "choice": sweep.choice_file(1)}
    return parts.get(name, sweep.path / name)


@pytest.mark.parametrize("name", FILES)
def test_a_broken_file_of_a_sweep(name: str, sweep: Sweep, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """Each of the texts in its place, and a folder: sweep.json ends every command, any other file costs its trial."""
    path = file_of(sweep, name)

    def own() -> None:
        run.main(SPECS["search"])

    for number, (what, text) in enumerate([*TEXTS.items(), ("folder", None)]):
        path.unlink(missing_ok=True)
        if text is None:
            path.mkdir()
        else:
            path.write_bytes(text)
        words = COMMANDS[number % len(COMMANDS)]
        line = [words[0], str(sweep.path), *words[1:]]
        if name != "sweep.json":
            monkeypatch.setattr(sys, "argv", ["command", *line])
            assert looking.main() == 0, (what, capsys.readouterr())
            assert capsys.readouterr().err == ""
            monkeypatch.setattr(sys, "argv", ["command", "status", str(sweep.path)])
            assert looking.main() == 0
            said = capsys.readouterr().out
            assert "1 damaged" in said, (what, said)
            assert f"{path.name}: " in said, (what, said)
            continue
        said = refused(looking.main, line, monkeypatch, capsys)
        assert path.name in said, (what, said)
        if number % 4 == 0 or text is None:
            said = refused(own, ["--runs-dir", str(sweep.path.parent), *ARGUMENTS["search"]], monkeypatch, capsys)
            assert path.name in said, (what, said)
    assert not list(sweep.path.glob("trials/*/metrics.jsonl"))


@pytest.mark.parametrize("text", [*TEXTS.values(), None], ids=[*TEXTS, "folder"])
def test_a_broken_configuration_of_a_run(text: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    path = tmp_path / "run" / "config.yaml"
    path.parent.mkdir()
    if text is None:
        path.mkdir()
    else:
        path.write_bytes(text)
    said = refused(pretrain.main, [f"run_dir={path.parent}", "optimizer.warmup_epochs=0"], monkeypatch, capsys)
    assert "config.yaml must be a file that a run wrote" in said


@pytest.mark.parametrize("key", ["method", "data", "encoder", "optimizer", "seed", "epochs", "probes"])
@pytest.mark.parametrize("value", [None, [], {}, "x", float("nan"), {"name": "nope"}, {"x": {"y": 1}}], ids=str)
def test_nonsense_in_a_configuration_of_a_run(
    key: str, value: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    from cnnjepa.run.identity import to_dict

    (tmp_path / "config.yaml").write_text(json.dumps({**to_dict(tiny_config()), key: value}))
    said = refused(pretrain.main, [f"run_dir={tmp_path}", "optimizer.warmup_epochs=0"], monkeypatch, capsys)
    # An empty part is one of defaults, and so another configuration.
    other = value == {} and key in ("data", "encoder", "optimizer", "probes")
    rule = "run folder must be empty or hold the same configuration" if other else "config.yaml must be a file that a run wrote"
    assert said.startswith(f"error: {rule}; got {tmp_path}")


@pytest.mark.parametrize("what", ["nowhere", "file", "loop", "empty"])
@pytest.mark.parametrize("line", COMMANDS, ids=lambda line: line[0])
def test_what_is_no_sweep_folder(what: str, line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    path = tmp_path / what
    if what == "file":
        path.write_text("x")
    if what == "empty":
        path.mkdir()
    if what == "loop":
        path.symlink_to(path)
    refused(looking.main, [line[0], str(path), *line[1:]], monkeypatch, capsys)


@pytest.mark.parametrize("where", ["trials", "points", "sweep.json"])
def test_a_file_where_a_folder_should_be(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """And the other way round: said before anything has started."""
    spec, line = SPECS["search"], ["--runs-dir", str(tmp_path), *ARGUMENTS["search"]]
    made, _ = plan(spec, parse(spec, line))
    path = made.path / where.format(signature=made.trials[0].signature)
    path.parent.mkdir(parents=True)
    if where == "sweep.json":
        path.mkdir()
    else:
        path.write_text("x")
    said = refused(lambda: run.main(spec), line, monkeypatch, capsys)
    assert path.name in said
