"""The Ray that a sweep starts on this machine: nobody else can reach it, or is answered; and no secret of the environment is kept."""

import ipaddress
import os
import re
import signal
import stat
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.support import forked
from tests.support.tiny import OVERRIDES
from tests.sweeps.execution.test_end_to_end import ROOT, command, wait_for_steps
from tests.sweeps.execution.test_ray_allocation import DEFAULT_PORTS, asks_for_a_token, connect

pytestmark = pytest.mark.slow

SECRET = "-".join(["s3cr3t", "5f1e0c"])
SECRETS = {"HF_TOKEN": SECRET, "AWS_SECRET_ACCESS_KEY": SECRET, "WANDB_API_KEY": SECRET, "DATABASE_URL": f"postgres://u:{SECRET}@h/x"}


def listening(processes: list[psutil.Process]) -> set[tuple[str, int]]:
    return {(c.laddr.ip, c.laddr.port) for p in processes for c in p.net_connections() if c.status == psutil.CONN_LISTEN}


def is_loopback(ip: str) -> bool:
    address = ipaddress.ip_address(ip)
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def files_with(secret: str, folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file() and not p.is_symlink() and secret.encode() in p.read_bytes()]


def test_it_listens_on_the_loopback_alone_asks_for_a_token_and_leaves_no_secret(tmp_path: Path) -> None:
    child = subprocess.Popen(
        command(tmp_path, "--seeds", "1", "max_parallel=1"),
        cwd=ROOT,
        env={**os.environ, **SECRETS},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_for_steps(tmp_path, 3, child)
        (private,) = Path("/tmp").glob(f"cnnjepa-{child.pid}-*")
        assert stat.S_IMODE(private.stat().st_mode) == 0o700
        token = private / "token"
        assert stat.S_IMODE(token.stat().st_mode) == 0o600
        below = [psutil.Process(child.pid), *psutil.Process(child.pid).children(recursive=True)]
        found = listening(below)
        assert len(found) >= 4, "of Ray's head, its node, the driver and a worker"
        assert [a for a in found if not is_loopback(a[0])] == []
        assert not {port for _, port in found} & DEFAULT_PORTS, "no dashboard, and nothing that two users of a machine would both want"
        deadline = time.monotonic() + 120  # a process that has just started may not answer yet
        while (silent := [p for _, p in found if not asks_for_a_token("127.0.0.1", p)]) and time.monotonic() < deadline:
            time.sleep(1)
        assert silent == []
        lines = [" ".join(p.cmdline()) for p in below if p.is_running()]
        (address,) = {match for line in lines for match in re.findall(r"--gcs-address=(\S+)", line)}
        assert connect(address, token).returncode == 0
        wrong = tmp_path / "wrong"
        wrong.write_text("0" * 64)
        for other in (None, wrong):
            refused = connect(address, other)
            assert refused.returncode != 0
            assert "auth" in refused.stderr.lower()
        servers = [p for p in below if p.is_running() and p.name() in ("gcs_server", "raylet")]
        assert len(servers) == 2
        for environment in (p.environ() for p in servers):
            assert environment["RAY_AUTH_MODE"] == "token"
            assert environment["RAY_USAGE_STATS_ENABLED"] == "0"
        # Ray's own log tells the environment: it lies in that private folder, and goes with it.
        assert files_with(token.read_text(), tmp_path) == []
        out, _ = child.communicate(timeout=300)
        assert child.returncode == 0, out
    finally:
        child.kill()
        child.wait()
    assert not private.exists()
    assert SECRET not in out
    assert files_with(SECRET, tmp_path) == []


def test_a_single_run_keeps_no_secret_of_its_environment_or_its_command_line(tmp_path: Path) -> None:
    line = ["-m", "jobs.pretrain", *OVERRIDES, "epochs=1", "log.tensorboard=true"]
    line += [f"data.root='{tmp_path}/token={SECRET}'", f"run_dir={tmp_path / 'run'}"]
    (tmp_path / "text").write_text(SECRET)
    assert files_with(SECRET, tmp_path) == [tmp_path / "text"], "the search can fail"
    (tmp_path / "text").unlink()
    done = forked.run(line, env={**os.environ, **SECRETS})
    assert done.returncode != -signal.SIGKILL
    assert (tmp_path / "run" / "provenance.json").exists(), done.stdout + done.stderr
    held = files_with(SECRET, tmp_path / "run")
    assert [p.name for p in held] == ["config.yaml"], "what is asked for as a value of the experiment is kept as one"
    assert "token=***" in (tmp_path / "run" / "provenance.json").read_text()
