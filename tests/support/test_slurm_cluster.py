"""The one-host Slurm of the tests: ports that no two clusters share, and a folder that holds one cluster."""

import fcntl
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support import slurm_cluster
from tests.support.documented import ROOT
from tests.support.slurm_bench import needs_slurm, started_cluster
from tests.support.slurm_cluster import InUseError, SlurmCluster, free_ports
from tests.support.slurm_files import Options

SLEEPS = [sys.executable, "-c", "import time; time.sleep(600)"]


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen(SLEEPS)
    yield child
    child.kill()
    child.wait()


@pytest.fixture
def none_reserved(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, int]]:
    """Forget, afterwards, what a test reserves."""
    reserved: dict[int, int] = {}
    monkeypatch.setattr(slurm_cluster, "_reserved", reserved)
    yield reserved
    for lock in reserved.values():
        os.close(lock)


def note(base: Path, name: str, pid: int, started: str) -> None:
    """As a cluster writes down what it has started."""
    (base / "run").mkdir(parents=True, exist_ok=True)
    (base / "run" / f"{name}.pid").write_text(f"{pid} {started}")


def started(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]


def test_two_that_look_for_ports_find_different_ones(tmp_path: Path, none_reserved: dict[int, int]) -> None:
    first, second = free_ports(folder=tmp_path), free_ports(folder=tmp_path)
    code = "import sys, pathlib; from tests.support.slurm_cluster import free_ports; print(free_ports(folder=pathlib.Path(sys.argv[1])))"
    line, environment = [sys.executable, "-c", code, str(tmp_path)], {**os.environ, "PYTHONPATH": str(ROOT)}
    other = subprocess.run(line, env=environment, capture_output=True, text=True, check=True, timeout=60)
    assert int(other.stdout) >= second + 20 >= first + 40
    os.close(none_reserved.pop(first))
    assert free_ports(folder=tmp_path) == first, "given back"


def test_a_port_that_another_program_listens_on_is_not_given(tmp_path: Path, none_reserved: dict[int, int]) -> None:
    first = free_ports(folder=tmp_path)
    os.close(none_reserved.pop(first))
    with socket.socket() as other:
        other.bind(("", first + 7))
        other.listen()
        assert free_ports(folder=tmp_path) > first


def test_a_node_keeps_the_ports_after_the_command_that_started_it(tmp_path: Path, none_reserved: dict[int, int]) -> None:
    port = free_ports(folder=tmp_path)
    cluster = SlurmCluster(tmp_path / "base", Options(port=port))
    for name in ("log", "run"):
        (cluster.base / name).mkdir(parents=True)
    cluster._spawn("gpu01", *SLEEPS, keeps=(none_reserved[port],))
    os.close(none_reserved.pop(port))  # as at the command's end
    try:
        with open(tmp_path / str(port)) as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        cluster._end("gpu01")
    with open(tmp_path / str(port)) as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def spawn(_: SlurmCluster, name: str, *command: str, **more: object) -> None:
        pytest.fail(f"{name} was started")

    monkeypatch.setattr(SlurmCluster, "_spawn", spawn)


@pytest.mark.usefixtures("nothing_starts")
def test_a_folder_whose_cluster_runs_is_refused_and_left_as_it_is(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    note(tmp_path, "slurmctld", sleeper.pid, started(sleeper.pid))
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "slurm.conf").write_text("its own")
    cluster = SlurmCluster(tmp_path, Options(port=15000))
    with pytest.raises(InUseError, match="must be a folder where no cluster runs; got slurmctld: stop it, or take another folder"):
        cluster.start()
    assert (tmp_path / "etc" / "slurm.conf").read_text() == "its own"
    assert sleeper.poll() is None


@pytest.mark.usefixtures("nothing_starts", "none_reserved")
def test_the_command_says_so_in_one_line(
    tmp_path: Path, sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    note(tmp_path, "gpu02", sleeper.pid, started(sleeper.pid))
    monkeypatch.setattr(sys, "argv", ["slurm_cluster.py", "start", str(tmp_path)])
    assert slurm_cluster.main() == 2
    said = f"error: {tmp_path} must be a folder where no cluster runs; got gpu02: stop it, or take another folder\n"
    assert capsys.readouterr() == ("", said)


def test_a_folder_in_which_another_process_starts_a_cluster_is_refused(tmp_path: Path) -> None:
    first, second = (SlurmCluster(tmp_path, Options(port=15000)) for _ in range(2))
    first._refuse_in_use()
    with pytest.raises(InUseError, match="got another process that starts, or has started, one"):
        second._refuse_in_use()
    first.stop()
    second._refuse_in_use()
    second.stop()


@pytest.mark.parametrize("dead", ["ended", "another of that number", "half written"])
def test_a_folder_whose_processes_are_dead_may_be_used_again(tmp_path: Path, sleeper: subprocess.Popen[bytes], dead: str) -> None:
    if dead == "ended":
        note(tmp_path, "slurmctld", sleeper.pid, started(sleeper.pid))
        sleeper.kill()
        sleeper.wait()
    elif dead == "another of that number":
        note(tmp_path, "slurmctld", sleeper.pid, str(int(started(sleeper.pid)) - 1))
    else:
        note(tmp_path, "slurmctld", 0, "")
    (tmp_path / "munge").mkdir()
    (tmp_path / "munge" / "sock").touch()
    cluster = SlurmCluster(tmp_path, Options(port=15000))
    assert cluster.running() == []
    cluster._refuse_in_use()
    assert not (tmp_path / "munge" / "sock").exists(), "else it would be taken for that of the new munged"
    cluster.stop()


def test_a_wait_is_bounded_and_names_what_it_waited_for(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match="the moon: not within 0 s"):
        SlurmCluster(tmp_path, Options(port=15000)).wait("the moon", lambda: False, 0)


def test_a_database_has_its_temporary_tables_in_the_folder_of_its_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A MariaDB that starts removes the temporary tables of any other that shares its --tmpdir."""
    lines: list[Sequence[str]] = []
    monkeypatch.setattr(slurm_cluster, "_program", lambda name: name)
    monkeypatch.setattr(subprocess, "run", lambda line, **_: lines.append(line))
    monkeypatch.setattr(SlurmCluster, "_spawn", lambda _, name, *line, **__: lines.append(line))
    monkeypatch.setattr(SlurmCluster, "run", lambda *_: "mini")
    monkeypatch.setattr(SlurmCluster, "wait", lambda *_: None)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        SlurmCluster(tmp_path / name, Options(port=15000))._start_database()
    databases = [line for line in lines if line[0] in ("mariadb-install-db", "mariadbd")]
    found = [[word for word in line if word.startswith("--tmpdir=")] for line in databases]
    assert found == [[f"--tmpdir={tmp_path / name}/db/tmp"] for name in ("a", "a", "b", "b")]
    assert all((tmp_path / name / "db" / "tmp").is_dir() for name in ("a", "b"))


@needs_slurm
@pytest.mark.nightly
def test_two_clusters_that_start_at_once_both_keep_accounts() -> None:
    both = threading.Barrier(2, timeout=300)

    def accounts(port: int) -> str:
        both.wait()
        with started_cluster(Options(port=port, gather="linux")) as made:
            both.wait()
            return made.run("sacctmgr", "-nP", "list", "cluster", "format=cluster").strip()

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(accounts, [free_ports(), free_ports()])) == ["mini", "mini"]
