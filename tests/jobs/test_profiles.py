"""Cluster profiles: what they say, what breaks a rule, and how the command line fills them in."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from cnnjepa.run.ranks import Device
from jobs import config
from jobs.cluster import RENAMED, ClusterProfile, Scheduler, fit_to, validate_cluster
from jobs.config import compose_job
from jobs.slurm.queue import Queue
from sweeps.cli.plan import parse, plan
from sweeps.execution.slurm_array import SlurmEngine
from sweeps.predictor_ablation import SWEEP
from sweeps.spec.sweep import Scale
from sweeps.state.folder import Sweep
from sweeps.state.submission import Submission
from tests.support.tiny import OVERRIDES, tiny_config

SLURM = ClusterProfile("x", Scheduler.slurm, ranks_per_trial=4, cores_per_trial=64, gpus_per_trial=4.0)


def test_komondor_is_what_its_operator_says() -> None:
    job = compose_job(["cluster=komondor", "account=abc"])
    cluster = job.cluster
    assert (cluster.nodes_per_trial, cluster.ranks_per_trial, cluster.threads_per_rank, cluster.gpus_per_node) == (1, 4, 16, 4)
    assert (cluster.gres, cluster.memory_gb_per_trial, cluster.partition, cluster.qos) == ("gpu:4", 256, "gpu", "normal")
    assert (job.train.device, job.train.threads) == (Device.cuda, 16)
    assert cluster.runs_dir.startswith("/scratch/abc/")
    assert job.train.data.root.startswith("/scratch/abc/")


def test_a_missing_account_is_one_clear_line() -> None:
    with pytest.raises(ValueError, match=r"^cluster\.account must be given for cluster komondor; got none: add account=VALUE$"):
        compose_job(["cluster=komondor"])


def test_a_profiles_keys_have_a_short_form() -> None:
    long, short = (compose_job(["cluster=komondor", f"{prefix}account=abc", f"{prefix}max_parallel=3"]) for prefix in ("cluster.", ""))
    assert long.cluster == short.cluster


def test_an_unknown_field_of_a_profile_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(config.CONFIG_DIR, tmp_path / "slurm")
    (tmp_path / "slurm" / "cluster" / "mine.yaml").write_text("name: mine\nscheduler: slurm\npartitoin: gpu\n")
    monkeypatch.setattr(config, "CONFIG_DIR", tmp_path / "slurm")
    with pytest.raises(
        ValueError, match=r"mine\.yaml must hold keys of ClusterProfile .*; got partitoin; did you mean partition\?"
    ) as said:
        compose_job(["cluster=mine"])
    assert "\n" not in str(said.value)


@pytest.mark.parametrize("key", RENAMED)
def test_a_key_of_version_0_1_names_the_new_one(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new = key.replace("slot", "trial")
    for prefix in ("", "cluster."):
        said = rf"^{key} must be written {new}; got {prefix}{key}=1: write {prefix}{new}=1$"
        with pytest.raises(ValueError, match=said):
            compose_job([f"{prefix}{key}=1"])
    shutil.copytree(config.CONFIG_DIR, tmp_path / "slurm")
    (tmp_path / "slurm" / "cluster" / "mine.yaml").write_text(f"name: mine\nscheduler: slurm\n{key}: 1\n")
    monkeypatch.setattr(config, "CONFIG_DIR", tmp_path / "slurm")
    with pytest.raises(ValueError, match=rf"mine\.yaml must hold keys .*; got {key}: write {new}, and likewise for every key .*_per_slot$"):
        compose_job(["cluster=mine"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cores_per_trial": 0}, "cluster.cores_per_trial must be at least 1; got 0"),
        ({"ranks_per_trial": 0}, "cluster.ranks_per_trial must be at least 1; got 0"),
        ({"nodes_per_trial": 0}, "cluster.nodes_per_trial must be at least 1; got 0"),
        ({"gpus_per_trial": -1.0}, "cluster.gpus_per_trial must be at least 0 and finite; got -1.0"),
        ({"memory_gb_per_trial": 0.0}, "cluster.memory_gb_per_trial must be at least 0.01 and finite; got 0.0"),
        ({"gpus_per_trial": float("inf")}, "cluster.gpus_per_trial must be at least 0 and finite; got inf"),
        ({"max_parallel": -1}, "cluster.max_parallel must be at least 0; got -1"),
        ({"max_queued": -4}, "cluster.max_queued must be at least 0; got -4"),
        ({"local_scratch": "tmp"}, "cluster.local_scratch must be an absolute path, or begin with $ as in $TMPDIR; got tmp"),
        ({"gpus_per_trial": 0.5}, "cluster.gpus_per_trial must be whole GPUs, the same for each of 1 nodes; got 0.5"),
        ({"nodes_per_trial": 3, "gpus_per_trial": 3.0}, "cluster.ranks_per_trial must be a multiple of 3 nodes; got 4"),
        ({"cores_per_trial": 63}, "cluster.cores_per_trial must be a multiple of 4 ranks; got 63"),
        ({"time_limit_minutes": 0, "stop_signal_seconds": 1}, "cluster.time_limit_minutes must be at least 1; got 0"),
        ({"stop_signal_seconds": 3600}, "cluster.stop_signal_seconds must lie in [1, 3600), within time_limit_minutes; got 3600"),
        (
            {"scheduler": Scheduler.local, "gpus_per_trial": 1.0},
            "cluster.ranks_per_trial must be 1 on this machine; torchrun starts more; got 4",
        ),
        (
            {"scheduler": Scheduler.local, "gpus_per_trial": 1.0, "ranks_per_trial": 2},
            "cluster.ranks_per_trial must be 1 on this machine; torchrun starts more; got 2",
        ),
        ({"scheduler": Scheduler.local, "gpus_per_trial": 1.5, "ranks_per_trial": 1}, "cluster.gpus_per_trial must lie in [0, 1]; got 1.5"),
        ({"stop_signal_seconds": 0}, "cluster.stop_signal_seconds must lie in [1, 3600), within time_limit_minutes; got 0"),
        ({"max_parallel": 1_000_001}, "cluster.max_parallel must be at most 1000000; got 1000001"),
        ({"time_limit_minutes": 5_000_001}, "cluster.time_limit_minutes must be at most 5000000; got 5000001"),
    ],
)
def test_a_broken_rule_is_named_with_its_value(changes: dict[str, object], message: str) -> None:
    validate_cluster(SLURM)
    with pytest.raises(ValueError) as said:  # noqa: PT011, the whole message is compared
        validate_cluster(replace(SLURM, **changes))
    assert str(said.value) == message


def test_a_profile_fills_in_what_cannot_change_a_result_and_overrides_nothing() -> None:
    cluster = replace(SLURM, device=Device.cuda, data_root="/data")
    train = tiny_config()
    fit_to(cluster, train)
    assert (train.threads, train.device, train.data.root) == (16, Device.cuda, "/data")
    train = tiny_config(device=Device.cpu)
    train.data.root = "/mine"
    fit_to(cluster, train)
    assert (train.device, train.data.root) == (Device.cpu, "/mine")


OWN = """name: mine
scheduler: slurm
required: [account]
partition: gpu
runs_dir: /scratch/${.account}/runs
setup: ['export A=\\${HOME}']
"""


def test_a_profile_is_read_from_any_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site, old").mkdir()
    file = tmp_path / "site, old" / "mine.yaml"
    file.write_text(OWN)
    monkeypatch.chdir(tmp_path / "site, old")
    monkeypatch.setenv("HOME", str(tmp_path))
    for given in ("./mine.yaml", "mine.yaml", "../site, old/mine.yaml", str(file), "~/site, old/mine.yaml"):
        cluster = compose_job([f"cluster={given}", "account=abc", "max_parallel=3"]).cluster
        assert (cluster.name, cluster.partition, cluster.runs_dir, cluster.max_parallel) == ("mine", "gpu", "/scratch/abc/runs", 3)
        assert cluster.setup == ["export A=${HOME}"]
    file.write_text(OWN.replace("gpu", "long"))
    assert compose_job(["cluster=mine.yaml", "account=abc"]).cluster.partition == "long"
    assert compose_job(["cluster=komondor", "account=abc"]).cluster.name == "komondor"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cluster must be a name, or the path of a file; got ./mine.yaml: there is no such file"),
        ("name: yours\n", "{file} must hold name: mine; got 'yours'"),
        ("scheduler: slurm\n", "{file} must hold name: mine; got 'local'"),
        (
            "name: mine\npartitoin: gpu\n",
            "{file} must hold keys of ClusterProfile (jobs/cluster.py); got partitoin; did you mean partition?",
        ),
        ("name: [a\n", "{file} must be YAML; got "),
        ("- name\n", "{file} must be a file of keys and values; got a list"),
        ("mine\n", "{file} must hold "),
        ("", "{file} must hold name: mine; got 'local'"),
        ("name: mine\nrequired: [account]\n", "cluster.account must be given for cluster mine; got none: add account=VALUE"),
        ("name: mine\ncores_per_trial: 0\n", "cluster.cores_per_trial must be at least 1; got 0"),
        (b"name: \xff\xfe\n", "{file} must be YAML; got "),
    ],
)
def test_a_file_of_ones_own_that_is_wrong_is_named(
    text: str | bytes | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "mine.yaml"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match="must") as said:
        compose_job(["cluster=./mine.yaml"])
    assert str(said.value).startswith(message.format(file=file))
    assert "\n" not in str(said.value)


def test_a_folder_is_no_profile(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must be a file of keys and values; got "):
        compose_job([f"cluster={tmp_path}"])


def test_a_submission_keeps_what_a_file_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers, and commands typed later, read the profile in the sweep folder."""
    file = tmp_path / "mine.yaml"
    file.write_text(OWN + "sbatch: {mem: null, exclusive: true}\nexport: [NAMED]\n")
    spec = replace(SWEEP, smoke=Scale(OVERRIDES, seeds=1))
    asked = parse(spec, ["--cluster", str(file), "--scale", "smoke", "--runs-dir", str(tmp_path / "runs"), "account=abc"])
    sweep, cluster = plan(spec, asked)
    sweep.write()
    SlurmEngine(sweep, cluster, tmp_path, Queue()).planned(1, 1, []).create()
    file.unlink()
    monkeypatch.chdir("/")
    (made,) = Submission.all_of(Sweep.load(sweep.path))
    assert made.cluster == cluster
    assert made.cluster.sbatch == {"mem": None, "exclusive": True}
