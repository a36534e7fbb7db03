"""Many workers in one allocation, on a real Slurm and with a real Ray: one sweep on three backends, and what is done to the allocation."""

import json
import os
import re
import signal
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import grpc
import psutil
import pytest

from sweeps.state import claims
from sweeps.state.claims import Claim
from tests.support.slurm_bench import ROOT, SCRIPT, SweepOnSlurm, needs_slurm
from tests.support.slurm_cluster import SlurmCluster

pytestmark = [needs_slurm, pytest.mark.slow, pytest.mark.xdist_group("slurm-2")]

# A node with one GPU (of its four), for workers of one rank: on every backend a trial is then the same to the last bit.
NODE = ["gres=gpu:1", "gpus_per_trial=1", "ranks_per_trial=1", "memory_gb_per_trial=4"]
ONE_CORE, TWO_CORES = [*NODE, "cores_per_trial=1"], [*NODE, "cores_per_trial=2"]
SERVICES = [
    "InternalKVGcsService/InternalKVKeys",
    "NodeManagerService/GetNodeStats",
    "ObjectManagerService/Push",
    "CoreWorkerService/PushTask",
    "ReporterService/GetTraceback",
]
DEFAULT_PORTS = {6379, 8265, 10001, 52365}


# Workers of one rank cannot be held at a step: the runs are long enough to be hit in the middle.
STEPS_AN_EPOCH, EPOCHS = 6, 24
STEPS = STEPS_AN_EPOCH * EPOCHS
SHAPE = ["data.train_limit=200", "global_batch_size=32", "micro_batch_size=8", "checkpoint.every_minutes=0.05"]
LONG = [*SHAPE, f"epochs={EPOCHS}"]
NAME = "slurm_sweep-smoke"  # of the folder that commands on this machine and on the cluster share


@pytest.fixture
def sweep(cluster: SlurmCluster, tmp_path: Path) -> SweepOnSlurm:
    return on(cluster, tmp_path)


def on(cluster: SlurmCluster, runs: Path) -> SweepOnSlurm:
    made = SweepOnSlurm(cluster, runs, steps=STEPS)
    made.profile = []
    return made


def local(runs: Path, *arguments: str) -> list[str]:
    return [sys.executable, str(SCRIPT), *arguments, "--cluster", "local", "--scale", "smoke", "--runs-dir", str(runs), "--name", NAME]


def ray(nodes: int, workers_per_node: int = 1) -> list[str]:
    return ["--backend", "allocation", "--nodes", str(nodes), "--trials-per-node", str(workers_per_node)]


def backend(claim: Claim) -> str:
    return "local" if claim.slurm is None else "ray" if claim.slurm.shared else "array"


def ended_by(sweep: SweepOnSlurm) -> list[str]:
    """The backend that ended each of the trials that have ended."""
    return [backend(claims.history(d)[-1]) for d in sweep.trial_dirs() if (d / "result.json").exists()]


def midway(sweep: SweepOnSlurm, by: str) -> bool:
    """Whether one trial has ended on that backend, and another runs on it and has gained steps."""
    running = [d for d in sweep.trial_dirs() if (d / "claim").exists() and not (d / "result.json").exists()]
    own = [d for d in running if (past := claims.history(d)) and backend(past[-1]) == by and not released(d, past[-1])]
    return by in ended_by(sweep) and any(sweep.step_of(d) >= 5 for d in own)


def released(trial_dir: Path, claim: Claim) -> bool:
    return (trial_dir / "claim" / f"{claim.attempt:06d}.released").exists()


def ray_of_nodes(cluster: SlurmCluster) -> dict[str, list[psutil.Process]]:
    """What Ray runs on each node, workers among it."""
    found = {}
    for name in cluster.names:
        below = []
        for pid in cluster.processes_of_node(name):
            try:
                line = " ".join(psutil.Process(pid).cmdline())
            except psutil.NoSuchProcess:
                continue
            if "ray::" in line or "/ray/" in line or "ray.scripts" in line or "sweeps.execution" in line:
                below.append(psutil.Process(pid))
        found[name] = below
    return found


def temporary_folders(cluster: SlurmCluster) -> set[Path]:
    lines = [" ".join(p.cmdline()) for below in ray_of_nodes(cluster).values() for p in below]
    return {Path(match) for line in lines for match in re.findall(r"--temp-dir=(\S+)", line)}


def assert_nothing_is_left(sweep: SweepOnSlurm, temporary: set[Path]) -> None:
    sweep.wait("Ray to be gone", lambda: not any(ray_of_nodes(sweep.cluster).values()), 30)
    assert not [p for p in temporary if p.parent.exists()]
    assert not (sweep.path / "ray").exists()


def test_three_hands_end_one_study(sweep: SweepOnSlurm) -> None:
    """Ray Tune on this machine, then a job array, then an allocation of three nodes; each begins where the one before was stopped."""
    epochs = 12
    steps, short = STEPS_AN_EPOCH * epochs, [*SHAPE, f"epochs={epochs}", "--seeds", "2"]
    first = subprocess.Popen(local(sweep.runs, "max_parallel=1", *short), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        sweep.wait("sweep.json", (sweep.path / "sweep.json").exists)
        sweep.wait("a trial on this machine", lambda: midway(sweep, "local"))
        check_privacy_here(first.pid)
        first.send_signal(signal.SIGTERM)
        out, _ = first.communicate(timeout=60)
        assert first.returncode == 130, out
    finally:
        first.kill()
    sweep.submit(*ONE_CORE, "max_parallel=1", *short, "--backend", "array")
    sweep.wait("a trial in the array", lambda: midway(sweep, "array"))
    assert "trials cancelled" in sweep.ask("cancel")
    sweep.wait("no job", lambda: not sweep.live_jobs(), 60)
    out = sweep.run(*ONE_CORE, *short, *ray(3))
    assert "3 nodes, 3 workers at once" in out
    assert "linear top-1, test" in out

    by = ended_by(sweep)
    assert len(by) == 6
    assert set(by) == {"local", "array", "ray"}, by
    shared = [c.slurm for d in sweep.trial_dirs() for c in claims.history(d) if c.slurm and c.slurm.shared]
    assert {s.node for s in shared} == set(sweep.cluster.names)
    assert {(s.gpus, s.restart) for s in shared} == {(1.0, 0)}
    assert len({s.job for s in shared}) == 1
    passed_on = [list(map(backend, claims.history(d))) for d in sweep.trial_dirs()]
    assert ["local", "array"] in passed_on, passed_on  # begun with one, ended with another
    assert any(h[0] != "ray" and h[-1] == "ray" for h in passed_on), passed_on
    for folder in sweep.trial_dirs():
        result = json.loads((folder / "result.json").read_text())
        assert (result["status"], result["claim"]) == ("completed", claims.history(folder)[-1].attempt)
        seen = re.findall(rf"^step (\d+)/{steps} ", (folder / "log" / "train.log").read_text(), re.M)
        assert seen == [str(i) for i in range(1, steps + 1)], "each step once, whoever ran it"
    again = sweep.run(*ONE_CORE, *short, *ray(3))
    assert "submitted" not in again
    assert_nothing_is_left(sweep, set())


@pytest.fixture(scope="module")
def undisturbed(shared_slurm: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> SweepOnSlurm:
    """Two trials that nothing befell, on this machine."""
    made = on(shared_slurm, tmp_path_factory.mktemp("undisturbed"))
    done = subprocess.run(local(made.runs, "two", *LONG), cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return made


CONNECT = """
import sys
from ray._raylet import GcsClient
print(GcsClient(address=sys.argv[1]).internal_kv_keys(b"", None, timeout=20))
"""


def connect(address: str, token: Path | None) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    if token is not None:
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    line = [sys.executable, "-c", CONNECT, address]
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=100, check=False)


def asks_for_a_token(host: str, port: int) -> bool:
    """Whether who listens there turns away who has none: by gRPC, of whichever of Ray's services it is, or by HTTP."""
    said = []
    with grpc.insecure_channel(f"{host}:{port}") as channel:
        for service in SERVICES:
            with pytest.raises(grpc.RpcError) as refused:
                channel.unary_unary(f"/ray.rpc.{service}")(b"", timeout=20)
            said.append(refused.value.code())
    if grpc.StatusCode.UNAUTHENTICATED in said:
        return True
    try:
        urllib.request.urlopen(f"http://{host}:{port}/", timeout=20).close()
    except urllib.error.HTTPError as error:
        return error.code in (401, 403)
    except OSError:
        return False
    return False


def check_privacy(sweep: SweepOnSlurm, tmp_path: Path) -> set[Path]:
    """Nobody else can reach or read the running cluster; returns its temporary folders."""
    (private,) = (sweep.path / "ray").iterdir()
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    token = private / "token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    temporary = temporary_folders(sweep.cluster)
    assert len(temporary) == 1
    for path in temporary:
        assert len(str(path)) < 45
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    mine = [p for below in ray_of_nodes(sweep.cluster).values() for p in below if p.name() != "srun"]
    listening = {c.laddr for p in mine for c in p.net_connections() if c.status == psutil.CONN_LISTEN}
    assert len(listening) >= 7, "of the head, the node's two processes, the driver and two workers"
    assert not {a.port for a in listening} & DEFAULT_PORTS, "two users of a node would both want it"
    assert [a for a in listening if not asks_for_a_token(a.ip if "." in a.ip else "127.0.0.1", a.port)] == []
    for node in ray_of_nodes(sweep.cluster).values():
        held = sum(p.memory_full_info().pss for p in node if "ray::ImplicitFunc" not in " ".join(p.cmdline()))
        assert held < 700e6, "workers apart"
    address = (private / "address").read_text()
    assert connect(address, token).returncode == 0
    wrong = tmp_path / "wrong"
    wrong.write_text("0" * 64)
    for other in (None, wrong):
        refused = connect(address, other)
        assert refused.returncode != 0, refused.stdout
        assert "auth" in refused.stderr.lower()
    return temporary


def check_privacy_here(driver: int) -> None:
    """Of the Ray cluster that a command has started on this machine."""
    (private,) = Path("/tmp").glob(f"cnnjepa-{driver}-*")
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert stat.S_IMODE((private / "token").stat().st_mode) == 0o600
    lines = [" ".join(p.cmdline()) for p in psutil.Process(driver).children(recursive=True)]
    (address,) = {match for line in lines for match in re.findall(r"--gcs-address=(\S+)", line)}
    assert connect(address, private / "token").returncode == 0
    refused = connect(address, None)
    assert refused.returncode != 0
    assert "auth" in refused.stderr.lower()


def raylet(sweep: SweepOnSlurm, node: str) -> psutil.Process:
    (found,) = [p for p in ray_of_nodes(sweep.cluster)[node] if p.name() == "raylet"]
    return found


def test_an_allocation_saves_before_its_end_and_goes_on(sweep: SweepOnSlurm, undisturbed: SweepOnSlurm) -> None:
    """As the time limit nears Slurm sends the job's signal to its steps, and the job is requeued; then a node loses its Ray.

    No step is lost but those that the workers of the one node had not saved.
    """
    sweep.submit("two", *LONG, *ONE_CORE, *ray(2))
    folder = sweep.wait_for_step(20)
    temporary = temporary_folders(sweep.cluster)
    assert len(temporary) == 2
    job = sweep.job_of(folder)
    sweep.cluster.run("scancel", "--signal=USR2", job)
    sweep.wait("its second start", lambda: len(claims.history(folder)) == 2)
    sweep.wait_for_step(sweep.step_of(folder) + 10)
    assert sweep.lost_steps(folder) == sweep.step_of(folder) - STEPS, "none was computed twice"
    temporary |= temporary_folders(sweep.cluster)
    raylet(sweep, sweep.node_of(folder)).kill()
    sweep.wait_for_end()
    sweep.check_against(undisturbed)
    for trial in sweep.trial_dirs():
        past = claims.history(trial)
        # The other trial's worker may come up only after the signal: how long a node's Ray takes is the machine's affair.
        assert all(c.slurm is not None and c.slurm.job == job and c.slurm.shared for c in past)
        restarts = [c.slurm.restart for c in past if c.slurm]
        assert restarts in ([[0, 1, 1]] if trial == folder else [[0, 1, 1], [1, 1], [0, 1], [1]])
        assert len({c.driver for c in past}) == len(past)
        saved = [released(trial, c) for c in past]
        assert saved == ([True, False, True] if trial == folder else [True] * len(past))
        assert trial == folder or sweep.lost_steps(trial) == 0
    assert len(sweep.jobs()) == 1
    (log,) = {c.slurm.log for c in claims.history(folder) if c.slurm}
    assert "Ray has ended by itself" in Path(log).read_text()
    assert_nothing_is_left(sweep, temporary)


@pytest.mark.nightly
def test_workers_of_an_allocation_die_and_are_cancelled_one_by_one(sweep: SweepOnSlurm, tmp_path: Path) -> None:
    """Two share a GPU, and nobody else gets in. One is killed and goes on at once, one is cancelled by name, at last all."""
    again = "two", *SHAPE, "epochs=400", *TWO_CORES
    assert "submitted job" in sweep.submit(*again, *ray(1, workers_per_node=2))
    assert "submitted" not in sweep.submit(*again, *ray(1, workers_per_node=2))
    assert "submitted" not in (out := sweep.submit(*again))
    assert "an allocation of this sweep is queued or running" in out
    first, second = sweep.trial_dirs()
    sweep.wait("both", lambda: min(sweep.step_of(first), sweep.step_of(second)) >= 10)
    temporary = check_privacy(sweep, tmp_path)
    before = claims.history(first)[-1]
    assert before.slurm is not None
    assert before.slurm.gpus == 0.5
    os.kill(before.owner.pid, signal.SIGKILL)
    sweep.wait("the trial to be taken up", lambda: len(claims.history(first)) == 2, 60)
    after = claims.history(first)[-1]
    assert after.slurm == before.slurm
    assert after.owner.pid != before.owner.pid
    assert len(claims.history(second)) == 1
    assert "step 1/2400 " in sweep.ask("logs", second.name[:8], "--no-follow")
    assert "1 trials cancelled, 0 jobs ended" in sweep.ask("cancel", second.name[:8])
    sweep.wait("it to be saved", lambda: released(second, claims.history(second)[-1]), 30)
    counts = sweep.status()["counts"]
    assert (counts["cancelled"], counts["running"]) == (1, 1)
    assert len(sweep.live_jobs()) == 1
    step = sweep.step_of(first)
    sweep.wait("the other to go on", lambda: sweep.step_of(first) > step, 60)
    assert "1 trials cancelled, 1 jobs ended" in sweep.ask("cancel")
    sweep.wait("no job", lambda: not sweep.live_jobs(), 60)
    assert sweep.status()["counts"]["cancelled"] == 2
    assert released(first, after)
    assert_nothing_is_left(sweep, temporary)
