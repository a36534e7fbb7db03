"""Slurm's commands and the shell they are called from: stand-ins of them on PATH write down their environment, or answer under a banner."""

import ast
import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from jobs import preflight
from jobs.config import compose_job
from jobs.slurm import clients, sacct
from jobs.slurm import queue as slurm
from jobs.slurm.sbatch import Array, submit
from jobs.slurm.supervisor import seconds_left
from tests.support.shell import BANNERS, CLIENTS, KEPT, SHELL


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Put programs of Slurm's names on PATH; each writes down its environment and prints the answer for its name."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def put(banner: str = "none", **answers: str) -> Path:
        before, after = BANNERS[banner]
        for name in CLIENTS:
            said = folder / f"{name}.said"
            said.write_bytes((before + answers.get(name, "") + after).encode("utf-8", "surrogateescape"))
            note = f"{{ printf '%s\\0' {name}; env -0; printf '\\0'; }} >> {tmp_path}/seen"
            (folder / name).write_text(f"#!/bin/sh\n{note}\ncat {said}\n")
            (folder / name).chmod(0o755)
        return tmp_path / "seen"

    return put


def seen(file: Path) -> list[tuple[str, dict[str, str]]]:
    calls = [call.split("\0") for call in file.read_text().split("\0\0") if call]
    return [(name, dict(pair.split("=", 1) for pair in pairs)) for name, *pairs in calls]


def array(folder: Path) -> Array:
    return Array("sweep-1", 3, 3, "sweeps.execution.worker_main", str(folder / "1.json"), folder, folder / "log")


ANSWERS = {
    "sbatch": "Submitted batch job 345\n",
    "squeue": "17_3|RUNNING|2|None|gpu01|x-0001|\n17_4|PENDING|0|Priority||x-0001|\n",
    "sinfo": "gpu01|gpu*|idle\ngpu02|gpu*|drained\n",
    "scontrol": "JobId=17 ArrayTaskId=3 JobState=RUNNING EndTime=2999-01-01T00:00:00 PartitionName=gpu Default=YES MaxTime=10 State=UP\n",
    "sacct": "17_3|COMPLETED|00:10:00|01:00:00|00:20:00|4|1|8G||\n17_3.batch|COMPLETED|00:10:00||00:20:00|4|1||2048K|1\n",
}


def test_every_client_is_asked_without_the_shells_slurm(
    stand_in: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in {**SHELL, **KEPT}.items():
        monkeypatch.setenv(key, value)
    file = stand_in(**ANSWERS)
    cluster = compose_job(["cluster=test_cluster"]).cluster
    preflight.preflight(cluster, array(tmp_path), tmp_path, 1, 1, [])
    assert preflight.nodes_away(cluster) == "1 of 2 nodes are drained"
    assert submit(cluster, array(tmp_path)) == "345"
    assert slurm.Queue(0).state("17_3") == "RUNNING"
    assert slurm.show_job("17_3")["JobState"] == "RUNNING"
    assert slurm.accounted_state("17_3") == "COMPLETED"
    assert sacct.used(["17_3"])["17_3"].steps == 1
    slurm.controller_parameter("MaxArraySize")
    slurm.cancel(["17_4"])
    slurm.site_tool("sbalance")
    slurm.ask(["srun", "--jobid=17", "true"])
    calls = seen(file)
    assert {name for name, _ in calls} == set(CLIENTS)
    for name, environment in calls:
        assert not {k: v for k, v in environment.items() if k in SHELL and v == SHELL[k]}, name
        assert {k: environment.get(k) for k in KEPT} == KEPT, name
        assert (environment["SLURM_TIME_FORMAT"], environment["LC_ALL"]) == ("standard", "C"), name


@pytest.mark.parametrize("banner", BANNERS)
def test_a_sites_banner_changes_no_answer(banner: str, stand_in: Callable[..., Path], tmp_path: Path) -> None:
    stand_in(banner, **ANSWERS)
    cluster = compose_job(["cluster=test_cluster", "time_limit_minutes=11"]).cluster
    assert submit(cluster, array(tmp_path)) == "345"
    assert [(e.id, e.state, e.name) for e in slurm.Queue(0).elements().values()] == [
        ("17_3", "RUNNING", "x-0001"),
        ("17_4", "PENDING", "x-0001"),
    ]
    assert slurm.show_job("17_3")["JobState"] == "RUNNING"
    assert slurm.accounted_state("17_3") == "COMPLETED"
    assert slurm.accounted_state("7_3") == slurm.accounted_state("17_33") == ""
    used = sacct.used(["17_3"])
    assert (set(used), used["17_3"].seconds, used["17_3"].memory_used_mb) == ({"17_3"}, 600.0, 2.0)
    assert preflight.nodes_away(cluster) == "1 of 2 nodes are drained"
    assert [f.level for f in preflight.check_limits(cluster)] == ["problem"]  # the partition allows 10 minutes
    assert seconds_left("17_3") > 1e9


def test_an_sbatch_that_says_no_number_is_an_error_in_its_words(stand_in: Callable[..., Path], tmp_path: Path) -> None:
    stand_in(sbatch="Welcome. 2 jobs of yours run.\n")
    with pytest.raises(slurm.SlurmError, match=r"^sbatch: must print the number of the job; got 'Welcome\. 2 jobs of yours run\.'$"):
        submit(compose_job(["cluster=test_cluster"]).cluster, array(tmp_path))


def test_of_an_errors_text_only_the_errors_count() -> None:
    said = "Connected to login2\nsbatch: NOTE: site policy 12\nsbatch: error: Batch job submission failed: Invalid account\n"
    assert clients.complaint(said) == "sbatch: error: Batch job submission failed: Invalid account"
    assert clients.complaint("slurm_load_jobs error: Unable to contact\nsbatch: fatal: x\n") == (
        "slurm_load_jobs error: Unable to contact sbatch: fatal: x"
    )
    assert clients.complaint(" not allowed\n\nhere ") == "not allowed here"


def test_a_client_that_does_not_answer_is_ended_with_all_that_it_has_started(tmp_path: Path) -> None:
    script = tmp_path / "squeue"
    script.write_text(f"#!/bin/sh\nsleep 1000 & echo $! > {tmp_path}/child\nwait\n")
    script.chmod(0o755)
    begun = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        clients.run([str(script)], timeout_seconds=1.0)
    assert time.monotonic() - begun < 20
    child = int((tmp_path / "child").read_text())
    until = time.monotonic() + 20  # the system ends it soon, not at once
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until
        time.sleep(0.05)


def test_what_starts_steps_keeps_its_job_and_no_options() -> None:
    job = {"SLURM_JOB_ID": "7", "SLURM_MEM_PER_NODE": "8", "SLURM_JOB_NODELIST": "gpu[01-02]", "SLURM_CPU_BIND": "cores", "PATH": "/bin"}
    assert clients.step_environment({**SHELL, **job}).items() >= {**job, "JOB_HOSTS": "gpu01 gpu02", "LC_ALL": "de_DE.UTF-8"}.items()
    assert clients.step_environment({**SHELL, **job}).keys().isdisjoint({"SBATCH_ACCOUNT", "SLURM_EXPORT_ENV", "SLURM_TIME_FORMAT"})


@pytest.mark.parametrize(("nodes", "said"), [("gpu[07-09]", "gpu07 gpu08,gpu09"), ("gpu03", "gpu03 ")])
def test_the_script_of_an_allocation_finds_its_nodes(nodes: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLURM_JOB_NODELIST", nodes)
    script = (Path(clients.__file__).parents[2] / "slurm" / "ray_cluster.sbatch").read_text()
    lines = re.findall(r"^(?:read -ra nodes|others=).*$", script, re.M)
    assert len(lines) == 2
    child = clients.start(["bash", "-uc", "\n".join([*lines, f'echo "${{nodes[0]}} $others" > {tmp_path}/said'])])
    assert child.wait(30) == 0
    assert (tmp_path / "said").read_text() == f"{said}\n"


@pytest.mark.parametrize(
    ("nodes", "names"),
    [
        ("gpu07", ["gpu07"]),
        ("gpu[07-09]", ["gpu07", "gpu08", "gpu09"]),
        ("gpu[1,3-4,010],cpu-1,cpu-2", ["gpu1", "gpu3", "gpu4", "gpu010", "cpu-1", "cpu-2"]),
        ("r[1-2]n[08-10].site", ["r1n08.site", "r1n09.site", "r1n10.site", "r2n08.site", "r2n09.site", "r2n10.site"]),
        ("", []),
    ],
)
def test_a_list_of_nodes_is_written_out(nodes: str, names: list[str]) -> None:
    assert clients.hosts(nodes) == names


def test_no_other_file_starts_one_of_slurms_commands() -> None:
    root = Path(clients.__file__).parents[2]
    found = []
    for path in [*(root / "jobs").rglob("*.py"), *(root / "sweeps").rglob("*.py")]:
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        started = [n for n in calls if ast.unparse(n.func).startswith(("subprocess.", "os.exec", "os.system", "os.popen", "os.spawn"))]
        words = {w.value for n in started for w in ast.walk(n) if isinstance(w, ast.Constant)}
        found += [f"{path.name}: {word}" for word in words if word in CLIENTS]
    assert found == []
    texts = [p.read_text() for p in (root / "slurm").glob("*.sbatch")]
    assert not [name for name in CLIENTS if name != "srun" for text in texts if re.search(rf"^[^#]*\b{name} ", text, re.M)]


def test_a_library_that_calls_slurm_itself_gets_the_same_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in SHELL.items():
        monkeypatch.setenv(key, value)
    expected = clients.environment()
    before = dict(os.environ)
    try:
        clients.adopt_environment()
        assert dict(os.environ) == expected
    finally:
        os.environ.clear()
        os.environ.update(before)
