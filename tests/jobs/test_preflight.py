"""What would stop a submission, without Slurm; with it, tests/sweeps/test_slurm_faults.py submits nothing that preflight refuses."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from cnnjepa.config import DATA_PRESETS, DatasetName
from cnnjepa.identity import to_dict
from cnnjepa.runs import RunFolder
from cnnjepa.train import train
from jobs import preflight, staging
from jobs.compose import compose_job
from jobs.submit import Array
from tests.jobs.test_staging import packed, set_of, settle
from tests.tiny import tiny_config

CLUSTER = compose_job(["cluster=test_cluster"]).cluster


def levels(found: list[preflight.Finding]) -> dict[str, str]:
    return {f.what: f.level for f in found}


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("2-00:00:00", 2880), ("01:00:00", 60), ("30", 30), ("15:30", 15.5), ("1-2", 1560), ("UNLIMITED", float("inf"))],
)
def test_slurms_durations(text: str, minutes: float) -> None:
    assert preflight.minutes_of(text) == minutes


def test_a_machine_without_slurm_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_the_images_must_be_there_and_be_as_many_as_the_set_has(monkeypatch: pytest.MonkeyPatch) -> None:
    digits = DATA_PRESETS["digits"]
    assert levels(preflight.check_data(digits)) == {"data": "ok"}
    assert levels(preflight.check_data(DATA_PRESETS["imagenet100"])) == {"data": "problem"}
    monkeypatch.setitem(preflight.EXPECTED_IMAGES, DatasetName.digits, (1437, 361))
    (found,) = preflight.check_data(digits)
    assert found.said.startswith("data.digits must have 1437 training and 361 test images; got digits: 1437 training and 360 test images")
    assert levels(preflight.checked_data(to_dict(digits))) == {"data": "ok"}  # in a process of its own


def test_the_room_of_a_run_is_that_of_its_checkpoints(tmp_path: Path) -> None:
    config, folder = tiny_config(epochs=1), RunFolder(tmp_path)
    folder.prepare(config)
    assert train(config, folder) is not None
    real = max(p.stat().st_size for p in folder.checkpoints.glob("*.pt")) * (config.checkpoint.keep + 1)
    assert real <= preflight.bytes_of_a_run(config) < real + 5 * 2**20


def test_what_is_staged_and_whether_it_fits_is_said(tmp_path: Path) -> None:
    source, scratch = packed(tmp_path / "set"), tmp_path / "scratch"
    scratch.mkdir()
    data: list[dict[str, object]] = [{**to_dict(DATA_PRESETS["digits"]), "root": ""}, {"root": str(source)}]
    assert preflight.check_staging(CLUSTER, data) == []
    cluster = replace(CLUSTER, local_scratch=str(scratch))
    (found,) = preflight.check_staging(cluster, data[:1])
    assert (found.level, found.said) == ("ok", "nothing is copied to the nodes: data.root holds no packed set")
    (found,) = preflight.check_staging(cluster, data)
    assert (found.level, found.said) == (
        "ok",
        f"each node copies 0.00 GB of {source} to {scratch} once; whether it fits there --on-node tells",
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
