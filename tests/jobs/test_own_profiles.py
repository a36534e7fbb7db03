"""Profiles of the user's folder and of other packages are found by name; a name that two files have is refused."""

from pathlib import Path

import pytest

from jobs import profiles
from jobs.config import absolute, cluster_names, compose_job
from tests.support.wheel import offer

DESK = "name: desk\nscheduler: local\nmax_parallel: 3\n"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "slurm" / "cluster").mkdir(parents=True)
    return tmp_path


def test_a_profile_of_the_users_folder_has_a_name(home: Path) -> None:
    (home / "slurm" / "cluster" / "desk.yaml").write_text(DESK)
    assert "desk" in cluster_names()
    assert compose_job(["cluster=desk"]).cluster.max_parallel == 3
    assert absolute("desk") == str(home / "slurm" / "cluster" / "desk.yaml")
    assert absolute("komondor") == "komondor"
    assert compose_job(["cluster=desk", "max_parallel=5"]).cluster.max_parallel == 5
    with pytest.raises(ValueError, match=r"cluster must be one of .*desk.*; got dsk"):
        compose_job(["cluster=dsk"])


@pytest.mark.parametrize("kind", ["package", "module"])
def test_a_profile_of_another_package_has_a_name(kind: str, home: Path) -> None:
    folder = home / "site" if kind == "package" else home
    folder.mkdir(exist_ok=True)
    (folder / ("__init__.py" if kind == "package" else "site_of_mine.py")).write_text("")
    (folder / "desk.yaml").write_text(DESK)
    offer(home, "theirs", cnnjepa_profiles={"desk": "site_of_mine"})
    if kind == "package":
        folder.rename(home / "site_of_mine")
    assert compose_job(["cluster=desk"]).cluster.max_parallel == 3
    (home / "slurm" / "cluster" / "desk.yaml").write_text(DESK)  # the same file once more
    assert compose_job(["cluster=desk"]).cluster.max_parallel == 3
    (home / "slurm" / "cluster" / "desk.yaml").write_text(DESK.replace("3", "4"))
    with pytest.raises(
        ValueError, match=r"cluster desk must be one file; got \S+desk\.yaml and \S+desk\.yaml: rename one, or give it by its path"
    ):
        compose_job(["cluster=desk"])


def test_an_entry_point_without_its_file_is_one_line(home: Path) -> None:
    offer(home, "theirs", cnnjepa_profiles={"desk": "no_such_module"})
    with pytest.raises(ValueError, match=r"the entry point desk of cnnjepa_profiles must name a package or module beside desk\.yaml"):
        compose_job(["cluster=desk"])


def test_a_file_that_is_called_like_a_shipped_one_is_refused_unless_it_is_the_same(home: Path) -> None:
    mine = home / "slurm" / "cluster" / "local.yaml"
    mine.write_bytes(profiles.shipped()["local"].read_bytes())
    assert compose_job(["cluster=local"]).cluster.name == "local"
    mine.write_text("name: local\nmax_parallel: 2\n")
    with pytest.raises(ValueError, match=r"cluster local must be one file; got \S+/slurm/cluster/local\.yaml and \S+local\.yaml"):
        compose_job(["cluster=local"])
    assert compose_job([f"cluster={mine}"]).cluster.max_parallel == 2
    assert compose_job(["cluster=test_cluster"]).cluster.name == "test_cluster"
