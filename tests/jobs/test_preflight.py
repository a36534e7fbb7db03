"""What would stop a submission, without Slurm; on a real one test_slurm_faults.py submits nothing that preflight refuses."""

import argparse
import os
import re
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cnnjepa import task
from cnnjepa.config import RateSchedule, method_module
from cnnjepa.data.datasets import EXPECTED_IMAGES
from cnnjepa.data.imagenet import classes_of
from cnnjepa.data_config import DATA_PRESETS, DatasetName
from cnnjepa.run.folder import RunFolder
from cnnjepa.run.identity import to_dict
from cnnjepa.train import train
from jobs import preflight, staging
from jobs.config import compose_job
from jobs.slurm import sbatch
from jobs.slurm.queue import SlurmError
from jobs.slurm.sbatch import Array
from jobs.task import Task, task_named
from tests.support.images import image_tree
from tests.support.staging import packed, set_of, settle
from tests.support.tiny import tiny_config

CLUSTER = compose_job(["cluster=test_cluster"]).cluster


def levels(found: list[preflight.Finding]) -> dict[str, str]:
    return {f.what: f.level for f in found}


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("2-00:00:00", 2880), ("01:00:00", 60), ("30", 30), ("15:30", 15.5), ("1-2", 1560), ("UNLIMITED", float("inf"))],
)
def test_slurms_durations(text: str, minutes: float) -> None:
    assert preflight.minutes_of(text) == minutes


def test_a_machine_without_slurm_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (found,) = preflight.check_request(CLUSTER, Array("x", 1, 1, "m", "", tmp_path, tmp_path))
    assert (found.level, found.what) == ("problem", "Slurm")


def test_the_runs_folder_must_be_writable_and_have_room(tmp_path: Path) -> None:
    assert levels(preflight.check_folders(tmp_path, 1, 1000))["room"] == "ok"
    found = preflight.check_folders(tmp_path, 1000, 10**15)
    assert levels(found)["room"] == "problem"
    assert "1000 runs" in found[-1].said
    (tmp_path / "file").touch()
    assert levels(preflight.check_folders(tmp_path / "file", 1, 0)) == {"runs folder": "problem"}


@pytest.mark.parametrize(
    ("free", "inodes", "total_inodes", "level"),
    [
        (3000, 120, 10**6, "ok"),  # just enough of both
        (2999, 120, 10**6, "problem"),
        (3000, 119, 10**6, "problem"),
        (3000, 0, 0, "ok"),  # a file system that counts no inodes
        (0, 120, 10**6, "problem"),
    ],
)
def test_room_is_asked_for_all_runs_and_for_their_files(
    free: int, inodes: int, total_inodes: int, level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What others than root may use: f_bavail and f_favail."""
    room = SimpleNamespace(f_bavail=free, f_bfree=10**12, f_frsize=1, f_bsize=4096, f_favail=inodes, f_ffree=10**12, f_files=total_inodes)
    monkeypatch.setattr(preflight.os, "statvfs", lambda _: room)
    found = preflight.check_folders(tmp_path, 3, 1000)
    assert levels(found)["room"] == level
    assert f"0.0 GB and 120 files needed at most, {free / 1e9:.1f} GB and {inodes} inodes free" in found[1].said


Answer = Callable[[str | Exception], None]


@pytest.fixture
def slurm_says(monkeypatch: pytest.MonkeyPatch) -> Answer:
    """Puts an answer into the mouth of whatever Slurm command is asked next."""

    def answer(text: str | Exception) -> None:
        def ask(command: Sequence[str], patience_seconds: float = 0.0) -> str:
            if isinstance(text, Exception):
                raise text
            return text

        monkeypatch.setattr(preflight.slurm, "ask", ask)

    return answer


PARTITION = "PartitionName=gpu Default=NO MaxTime={time} State={state}\nPartitionName=cpu Default=YES MaxTime=00:30:00 State=UP\n"


@pytest.mark.parametrize(
    ("minutes", "time", "level"),
    [(60, "01:00:00", "ok"), (61, "01:00:00", "problem"), (1441, "1-00:01:00", "ok"), (1442, "1-00:01:00", "problem")],
)
def test_a_time_limit_fits_the_partitions(minutes: int, time: str, level: str, slurm_says: Answer) -> None:
    slurm_says(PARTITION.format(time=time, state="UP"))
    (found,) = preflight.check_limits(replace(CLUSTER, partition="gpu", time_limit_minutes=minutes))
    assert (found.what, found.level) == ("time limit", level)
    if level == "problem":
        assert found.said == f"cluster.time_limit_minutes must be at most the partition's {minutes - 1}; got {minutes}"


def test_limits_are_those_of_the_default_partition_where_none_is_named(slurm_says: Answer) -> None:
    slurm_says(PARTITION.format(time="UNLIMITED", state="DOWN"))
    for minutes, level in ((30, "ok"), (31, "problem")):
        assert levels(preflight.check_limits(replace(CLUSTER, partition="", time_limit_minutes=minutes))) == {"time limit": level}
    limit, state = preflight.check_limits(replace(CLUSTER, partition="gpu", time_limit_minutes=10**6))
    assert (limit.level, limit.said) == ("ok", "1000000 min; the partition allows UNLIMITED")
    assert (state.level, state.said) == ("warning", "gpu is DOWN: jobs wait until it is UP")
    slurm_says(SlurmError("scontrol: Invalid partition name specified"))
    (found,) = preflight.check_limits(replace(CLUSTER, partition="gpu"))
    assert (found.level, found.said) == (
        "problem",
        "cluster.partition must be one that Slurm has; got gpu: scontrol: Invalid partition name specified",
    )


@pytest.mark.parametrize(
    ("states", "said"),
    [
        ("idle mixed allocated completing planned reserved", ""),
        ("idle drained down idle", "2 of 4 nodes are down, drained"),
        ("drained drained idle*", "3 of 3 nodes are drained, idle*"),  # the star: a node that does not respond
        ("idle~ powering_up# maint future", "2 of 4 nodes are future, maint"),  # a cloud's nodes start when they are needed
    ],
)
def test_nodes_that_are_away_are_counted(states: str, said: str, slurm_says: Answer) -> None:
    lines = [f"gpu{i}|gpu*|{state}\ngpu{i}|other|down\n" for i, state in enumerate(states.split())]
    slurm_says("".join(lines))
    assert preflight.nodes_away(replace(CLUSTER, partition="")) == said, "those of the default partition, each once"
    slurm_says(SlurmError("sinfo: silent"))
    assert preflight.nodes_away(CLUSTER) == ""


def test_a_request_that_no_node_can_serve_now_is_a_problem_unless_nodes_are_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = ["idle", "idle"]
    refusal = "sbatch: Requested node configuration is not available"

    def ask(command: Sequence[str], patience_seconds: float = 0.0) -> str:
        if command[0] == "sbatch":
            assert command[1] == "--test-only"  # nothing is queued
            raise SlurmError(refusal)
        return "".join(f"gpu{i}|gpu|{state}\n" for i, state in enumerate(states))

    monkeypatch.setattr(preflight.slurm, "ask", ask)
    monkeypatch.setattr(preflight.shutil, "which", lambda name: f"/usr/bin/{name}")
    array = Array("x", 5, 1, "m", "", tmp_path, tmp_path)
    cluster = replace(CLUSTER, account="abc", partition="gpu")
    (found,) = preflight.check_request(cluster, array)
    assert (found.level, found.said) == (
        "problem",
        f"Slurm must accept the job (account abc, partition gpu, qos -, array of 5); got {refusal}",
    )
    states[:] = ["idle", "drained"]
    (found,) = preflight.check_request(cluster, array)
    assert found.level == "warning"
    assert found.said.startswith("1 of 2 nodes are drained: ")
    refusal = "sbatch: Invalid account"
    assert preflight.check_request(cluster, array)[0].level == "problem"


@pytest.mark.parametrize(("limit", "arrays", "what"), [(0, [], "a single job"), (1, [], "a single job"), (3, ["0-2%3"], "array of 3")])
def test_the_request_is_that_of_the_sites_jobs(
    limit: int, arrays: list[str], what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A site without arrays would refuse one."""
    asked: list[str] = []

    def ask(command: Sequence[str], patience_seconds: float = 0.0) -> str:
        asked.extend(re.findall(r"--array=(\S+)", Path(command[-1]).read_text()) if command[0] == "sbatch" else [])
        return f"MaxArraySize = {limit}\nPartitionName=gpu State=UP\n"

    monkeypatch.setattr(preflight.slurm, "ask", ask)
    monkeypatch.setattr(preflight.shutil, "which", lambda name: f"/usr/bin/{name}")
    words = argparse.Namespace(cluster="test_cluster", overrides=["data=digits"], runs_dir=tmp_path, workers=5, on_node=False, gpu=False)
    assert preflight.run(words) == 0
    assert asked == arrays
    assert f"sbatch --test-only accepts the script, {what}\n" in capsys.readouterr().out


@pytest.mark.parametrize(("limit", "job"), [(1, "7"), (1001, "7_0")])
def test_the_job_that_checks_a_node_is_followed_by_its_own_number(
    limit: int, job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(command: Sequence[str], patience_seconds: float = 0.0) -> str:
        if command[0] == "sbatch":
            assert ("--array" in Path(command[1]).read_text()) is (limit > 1)
            return "Submitted batch job 7\n"
        (folder,) = tmp_path.glob(".preflight-*")
        (folder / "from-node").write_text("gpu01: torch")
        (folder / "files").write_text("[]")
        (folder / "gpu").write_text('[["warning", "change", "encoder.execution=masked is faster"]]')
        return f"MaxArraySize = {limit}\n{job}|COMPLETED|0|None|gpu01|cnnjepa-preflight|\n"

    monkeypatch.setattr(preflight.slurm, "ask", ask)
    monkeypatch.setattr(sbatch, "ask", ask)
    monkeypatch.setattr(preflight, "check_other", lambda folder, who: [])
    found = preflight.check_on_node(CLUSTER, tmp_path, [])
    seen = [(f.level, f.what) for f in found]
    assert seen == [("ok", "node"), ("warning", "GPU change")]


def test_without_a_gpu_its_check_is_not_run_and_that_is_no_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = argparse.Namespace(cluster="local", overrides=[], runs_dir=None, workers=1, on_node=False, gpu=True)
    assert preflight.run(words) == 0
    assert capsys.readouterr().out in ("not run: torch sees no CUDA device\n", "not run: this torch is built without CUDA\n")
    words.on_node = True
    with pytest.raises(ValueError, match="--gpu must be given without --on-node"):
        preflight.run(words)


def test_a_problem_that_the_gpus_check_finds_fails_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(task, "check_gpu", lambda config, seconds: [("ok", "pace", f"{seconds:.0f}"), ("problem", "exact", "1e-3 apart")])
    task_named.cache_clear()
    try:
        assert preflight.check_gpu(tiny_config()) == 1
    finally:
        task_named.cache_clear()
    assert capsys.readouterr().out == "ok       pace: 450\nproblem  exact: 1e-3 apart\n"


def test_a_task_without_a_check_of_a_gpu_says_so() -> None:
    assert Task.check_gpu(task_named("cnnjepa.task"), None, 1.0) == [("not run", "gpu", "the task has no check of a GPU")]


def test_a_runs_folder_on_a_nodes_own_disk_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = [SimpleNamespace(mountpoint=at, fstype=kind) for at, kind in (("/", "ext4"), ("/scratch", "lustre"), ("/scratch/own", "xfs"))]
    monkeypatch.setattr(preflight.psutil, "disk_partitions", lambda all: mounts if all else [])
    for folder, level, kind in (("/home/me", "warning", "ext4"), ("/scratch/me", "ok", "lustre"), ("/scratch/own/me", "warning", "xfs")):
        found = preflight.check_shared(Path(folder))
        assert (found.what, found.level) == ("shared", level)
        assert found.said.startswith(f"{folder} is on {kind}")
    mounts.clear()
    assert preflight.check_shared(Path("/home")).said == "/home is on unknown"


def test_the_images_must_be_there_and_be_as_many_as_the_set_has(monkeypatch: pytest.MonkeyPatch) -> None:
    digits = tiny_config(data=DATA_PRESETS["digits"])
    assert levels(preflight.check_data(digits)) == {"data": "ok"}
    assert levels(preflight.check_data(tiny_config(data=DATA_PRESETS["imagenet100"]))) == {"data": "problem"}
    monkeypatch.setitem(EXPECTED_IMAGES, DatasetName.digits, (1437, 361))
    (found,) = preflight.check_data(digits)
    assert found.said == (
        "data.digits must have 361 test images; got 1437 training and 360 test images in the default folder: complete the set"
    )


def test_what_is_not_known_of_a_set_is_not_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kaggle = image_tree(tmp_path, classes_of("imagenet100_kaggle"), images=1)
    data = replace(DATA_PRESETS["imagenet100_kaggle"], root=str(kaggle))
    (found,) = preflight.check_data(tiny_config(data=data))
    assert found.said.startswith("data.imagenet100_kaggle must have 5000 test images; got 100 training and 100 test images in ")
    monkeypatch.setitem(EXPECTED_IMAGES, DatasetName.imagenet100_kaggle, (None, 100))
    assert levels(preflight.check_data(tiny_config(data=data))) == {"data": "ok"}


def test_the_data_are_checked_in_a_process_of_its_own_whose_death_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    digits = to_dict(tiny_config(data=DATA_PRESETS["digits"]))
    assert levels(preflight.checked_data(digits)) == {"data": "ok"}
    monkeypatch.setattr(preflight, "check_data", _whose_process)
    (found,) = preflight.checked_data(digits)
    assert int(found.said) != os.getpid()
    for broken, said in ((_killed, "BrokenProcessPool: A process in the process pool"), (_torn, "OSError: no such disk")):
        monkeypatch.setattr(preflight, "check_data", broken)
        (found,) = preflight.checked_data(digits)
        assert found.level == "problem"
        assert found.said.startswith(f"the images must be readable; got {said}")


def _whose_process(_config: object) -> list[preflight.Finding]:
    return [preflight.ok("data", str(os.getpid()))]


def _killed(_config: object) -> list[preflight.Finding]:
    os.kill(os.getpid(), signal.SIGKILL)
    return []


def _torn(_config: object) -> list[preflight.Finding]:
    raise OSError("no such\ndisk")


def test_the_room_of_a_run_is_that_of_its_checkpoints(tmp_path: Path) -> None:
    config, folder = tiny_config(epochs=1), RunFolder(tmp_path)
    folder.prepare(config)
    assert train(config, folder) is not None
    real = max(p.stat().st_size for p in folder.checkpoints.glob("*.pt")) * (config.checkpoint.keep + 1)
    assert real <= task.bytes_of_a_run(config) < real + 5 * 2**20


def test_the_room_of_a_run_is_its_weights_two_moments_and_a_head_for_each_checkpoint_and_one_that_is_written() -> None:
    config = tiny_config()
    method = method_module(config.method.name).Method(config, total_steps=1)
    weights = sum(tensor.untyped_storage().nbytes() for tensor in method.state_dict().values())
    trained = sum(p.untyped_storage().nbytes() for p in method.parameters() if p.requires_grad)  # in float32, as each moment is
    assert 0 < trained < weights
    for keep in (1, 2, 5):
        config.checkpoint.keep = keep
        config.optimizer.schedule = RateSchedule.cosine
        assert task.bytes_of_a_run(config) == (weights + 2 * trained + 2**20) * (keep + 1)
        config.optimizer.schedule = RateSchedule.wsd  # which keeps that of its stable phase too
        assert task.bytes_of_a_run(config) == (weights + 2 * trained + 2**20) * (keep + 2)


def test_what_is_staged_and_whether_it_fits_is_said(tmp_path: Path) -> None:
    source, scratch = packed(tmp_path / "set"), tmp_path / "scratch"
    scratch.mkdir()
    data: list[dict[str, object]] = [to_dict(tiny_config()), {"data": {"root": str(source)}}]
    assert preflight.check_staging(CLUSTER, data) == []
    cluster = replace(CLUSTER, local_scratch=str(scratch))
    (found,) = preflight.check_staging(cluster, data[:1])
    assert (found.level, found.said) == ("ok", "nothing is copied to the nodes: data.root holds no packed set")
    (found,) = preflight.check_staging(cluster, data)
    assert (found.level, found.said) == (
        "ok",
        f"each node copies 0.00 GB of {source} to {scratch} once; --on-node checks that it fits",
    )
    assert preflight.check_staging(cluster, data, staging.obstacle(set_of(source), str(scratch)))[0].said.endswith("once; it fits")
    (found,) = preflight.check_staging(cluster, data, staging.obstacle(set_of(source), "/sys"))
    assert found.level == "warning"
    assert f"a node cannot copy 0.00 GB of {source}" in found.said
    # A set that lies there already needs no room.
    settle(source, scratch)
    large = set_of(source)
    assert staging.obstacle(large, str(scratch)) == ""
    file = replace(large.files[0], bytes=2**43)
    assert "do not fit" in staging.obstacle(replace(large, files=(file, *large.files[1:])), str(scratch))
    os.truncate(staging.own_folder(str(scratch)) / large.key / file.path, 2**43)
    assert staging.obstacle(replace(large, files=(file, *large.files[1:])), str(scratch)) == ""
