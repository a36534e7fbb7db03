"""Cluster profiles: what they say, what breaks a rule, and how the command line fills them in."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from cnnjepa.run.ranks import Device
from jobs import config
from jobs.cluster import RENAMED, ClusterProfile, Scheduler, fit_to, validate_cluster
from jobs.config import compose_job
from tests.support.tiny import tiny_config

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
