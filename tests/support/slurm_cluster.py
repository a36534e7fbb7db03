"""A real Slurm on this host for tests: munged, slurmctld, one slurmd a node, and slurmdbd with MariaDB, under one folder, as any user.

    python tests/support/slurm_cluster.py start /tmp/ms      # prints the line that makes Slurm's commands use it
    python tests/support/slurm_cluster.py stop /tmp/ms       # also one of a test that was killed: its folder is /tmp/slurm-...

Each node claims 4 A100 (names only), 64 cores and 256 GB, as a gpu node of Komondor does. A node runs under a sub-reaper in its own UTS
and mount namespace, so that its host name is gpu01 and gpu01..03 resolve. What it cannot show: cgroup limits, real GPUs, NCCL.
"""

import argparse
import contextlib
import ctypes
import fcntl
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # as a script it has only its own folder on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.support import slurm_files
from tests.support.slurm_files import Options

PROGRAMS = ("munged", "slurmctld", "slurmd", "slurmdbd", "mariadbd", "mariadb-install-db", "sbatch", "srun", "squeue", "sacct")
PACKAGES = "slurmctld slurmd slurm-client munge slurmdbd mariadb-server-core mariadb-client-core"
_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
_CLONE_NEWNS, _CLONE_NEWUTS, _CLONE_NEWUSER = 0x20000, 0x4000000, 0x10000000
_MS_BIND, _MS_REC, _MS_PRIVATE, _PR_SET_CHILD_SUBREAPER = 4096, 16384, 1 << 18, 36


def missing_programs() -> list[str]:
    """What has to be installed before a cluster can be started."""
    return [p for p in PROGRAMS if shutil.which(p, path=_PATH) is None]


def _program(name: str) -> str:
    found = shutil.which(name, path=_PATH)
    assert found, f"{name} is missing: apt-get install {PACKAGES}"
    return found


def _stat(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()


def _alive(pid: int) -> bool:
    try:
        return _stat(pid)[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _below(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                children.setdefault(int(_stat(int(name))[1]), []).append(int(name))
            except (FileNotFoundError, ProcessLookupError):
                continue
    found, left = [], [pid]
    while left:
        more = children.get(left.pop(), [])
        found += more
        left += more
    return found


class SlurmCluster:
    """One cluster in `base`, a short path (its sockets must fit 90 characters)."""

    def __init__(self, base: Path, options: Options) -> None:
        self.base, self.options, self.own_options = base, options, options
        self._lock: int | None = None
        self.conf = base / slurm_files.CONF
        self.names = [f"gpu{i:02d}" for i in range(1, options.nodes + 1)]
        self.environment = {**os.environ, "SLURM_CONF": str(self.conf), "PATH": _PATH}

    # Configuration.

    def write(self) -> None:
        """Write all configuration files; the parameters can be changed by another `write` and `reconfigure`."""
        slurm_files.write(self.base, self.options, self.names)

    @staticmethod
    def at(base: Path) -> "SlurmCluster":
        """The cluster that `write` described in `base`."""
        return SlurmCluster(base, slurm_files.read(base))

    # Processes.

    def _pid_file(self, name: str) -> Path:
        return self.base / "run" / f"{name}.pid"

    def pid(self, name: str) -> int | None:
        """The process that we started under that name, None where it has ended; its start time tells it from a later one."""
        try:
            pid, started = self._pid_file(name).read_text().split()
            return int(pid) if _stat(int(pid))[19] == started and _alive(int(pid)) else None
        except (FileNotFoundError, ProcessLookupError, ValueError):  # the last where its writer was killed
            return None

    def _spawn(self, name: str, *command: str, keeps: tuple[int, ...] = ()) -> None:
        environment = {**self.environment, "MYSQL_UNIX_PORT": str(self.base / "db" / "sock")}
        with open(self.base / "log" / f"{name}.out", "ab") as log:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, cwd=self.base, start_new_session=True,
                pass_fds=keeps,
            )  # fmt: skip
        self._pid_file(name).write_text(f"{child.pid} {_stat(child.pid)[19]}")

    def _end(self, name: str, with_all_below: bool = False) -> None:
        pid, deadline = self.pid(name), time.monotonic() + 20
        while pid is not None and _alive(pid):
            hard = with_all_below or time.monotonic() > deadline
            for target in [*(_below(pid) if with_all_below else []), pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(target, signal.SIGKILL if hard else signal.SIGTERM)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
            time.sleep(0.05)
        self._pid_file(name).unlink(missing_ok=True)

    def run(self, *command: str, check: bool = True) -> str:
        """What one of Slurm's commands prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, check=False)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout

    def wait(self, what: str, holds: Callable[[], bool], seconds: float = 60) -> None:
        """Until `holds`; raises TimeoutError that names `what`."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                if holds():
                    return
            except (RuntimeError, subprocess.SubprocessError, OSError):
                pass
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what}: not within {seconds} s; see {self.base}/log")
            time.sleep(0.2)

    def running(self) -> list[str]:
        """The names of our processes that are alive."""
        return sorted(p.stem for p in (self.base / "run").glob("*.pid") if self.pid(p.stem) is not None)

    def _refuse_in_use(self) -> None:
        """Raise InUseError where another cluster runs in the folder, or is being started there."""
        self.base.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.base / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found = ", ".join(self.running())
        except BlockingIOError:
            found = "another process that starts, or has started, one"
        if found:
            os.close(self._lock)
            self._lock = None
            raise InUseError(f"{self.base} must be a folder where no cluster runs; got {found}: stop it, or take another folder")
        for name in ("munge/sock", "db/sock"):  # of one that was killed: nobody listens there
            (self.base / name).unlink(missing_ok=True)

    def start(self) -> None:
        """Start everything, and wait until all nodes answer. Raises InUseError, before anything is touched, where a cluster runs there."""
        b = self.base
        self._refuse_in_use()
        self.write()
        self._spawn("munged", _program("munged"), "-F", f"--socket={b}/munge/sock", f"--key-file={b}/munge/key", "--num-threads=10",
                    f"--pid-file={b}/run/munged.self", f"--log-file={b}/log/munged.log", f"--seed-file={b}/munge/seed")  # fmt: skip
        self.wait("munged", (b / "munge" / "sock").exists)
        self._start_database()
        self.start_controller()
        for name in self.names:
            self.start_node(name)
        self.wait("nodes", self._nodes_answer)

    def _nodes_answer(self) -> bool:
        states = self.run("sinfo", "-h", "-N", "-p", "gpu", "-o", "%T").split()
        return len(states) == len(self.names) and all(s in ("idle", "mixed", "allocated", "completing") for s in states)

    def _start_database(self) -> None:
        b, me = self.base, getpass.getuser()
        (b / "db").mkdir(exist_ok=True)
        (b / "db").chmod(0o700)  # no passwords: who can reach the socket gets in
        data = b / "db" / "data"
        # A MariaDB that starts removes the temporary tables of all others in its folder, which is /tmp otherwise.
        (b / "db" / "tmp").mkdir(exist_ok=True)
        temporary = f"--tmpdir={b / 'db' / 'tmp'}"
        if not data.exists():
            subprocess.run(
                [_program("mariadb-install-db"), "--no-defaults", f"--datadir={data}", f"--user={me}", temporary,
                 "--skip-test-db", "--auth-root-authentication-method=normal"], check=True, capture_output=True, timeout=120,
            )  # fmt: skip
        self._spawn("mariadbd", _program("mariadbd"), "--no-defaults", f"--user={me}", f"--datadir={data}", temporary,
                    f"--socket={b}/db/sock", "--skip-networking", "--skip-grant-tables",
                    f"--pid-file={b}/run/mariadbd.self", f"--log-error={b}/log/mariadbd.log",
                    "--innodb-buffer-pool-size=64M", "--innodb-log-file-size=16M", "--innodb-flush-log-at-trx-commit=0",
                    "--innodb-lock-wait-timeout=900")  # fmt: skip
        self.wait("mariadbd", (b / "db" / "sock").exists)
        self.start_accounting()
        if not self.run("sacctmgr", "-nP", "list", "cluster", "mini", "format=cluster").strip():
            for line in ("add cluster mini", "add account proj cluster=mini", f"add user {me} account=proj",
                         f"modify user {me} set defaultaccount=proj"):  # fmt: skip
                self.run("sacctmgr", "-i", *line.split())

    def limit(self, **limits: int) -> None:
        """Set limits of this user's association, such as MaxSubmitJobs=4; -1 lifts one."""
        words = [f"{key}={value}" for key, value in limits.items()]
        self.run("sacctmgr", "-i", "modify", "user", "where", f"user={getpass.getuser()}", "account=proj", "set", *words)

    def start_accounting(self) -> None:
        """Start slurmdbd, whose database runs, and wait until it answers."""
        self._spawn("slurmdbd", _program("slurmdbd"), "-D")
        self.wait("slurmdbd", lambda: bool(self.run("sacctmgr", "-n", "list", "qos")))

    def stop_accounting(self) -> None:
        """Stop slurmdbd; jobs go on, and sacct does not answer."""
        self._end("slurmdbd")

    def start_controller(self) -> None:
        """Start slurmctld, and wait until it answers."""
        self._spawn("slurmctld", _program("slurmctld"), "-D", "-f", str(self.conf))
        self.wait("slurmctld", lambda: "is UP" in self.run("scontrol", "ping"))

    def stop_controller(self) -> None:
        """Stop slurmctld, as for a restart; jobs go on."""
        self._end("slurmctld")

    def restore(self) -> None:
        """Give the cluster the options that it was made with, and all its nodes."""
        self.change(**asdict(self.own_options))
        self.bring_up()

    def bring_up(self) -> None:
        """Start what was stopped, and take back what was drained."""
        if self.pid("slurmctld") is None:
            self.start_controller()
        for name in self.names:
            if self.pid(name) is None:
                self.start_node(name)
        self.wait("nodes", self._all_taken_back)

    def _all_taken_back(self) -> bool:
        for name, state in (line.split() for line in self.run("sinfo", "-h", "-N", "-p", "gpu", "-o", "%N %T").splitlines()):
            if state.startswith(("drain", "down")):  # a node that answers, and is in neither, cannot be resumed
                self.run("scontrol", "update", f"nodename={name}", "state=resume", check=False)
        return self._nodes_answer()

    def change(self, **options: Any) -> None:
        """Change some of the options; jobs go on."""
        if replace(self.options, **options) == self.options:
            return
        before, self.options = self.options, replace(self.options, **options)
        self.write()
        self.stop_controller()  # some parameters are read at its start alone
        self.start_controller()
        if before.lines != self.options.lines:
            self.run("scontrol", "reconfigure")  # for those that nodes read, such as Prolog
        self.wait("nodes", self._nodes_answer)

    def start_node(self, name: str) -> None:
        """Start one node."""
        ports = _reserved.get(self.options.port)
        keeps = () if ports is None else (ports,)  # for as long as a node lives, also after the command that has started it
        self._spawn(name, sys.executable, os.path.abspath(__file__), "_node", str(self.base), name, keeps=keeps)

    def kill_node(self, name: str) -> None:
        """As a power cut: nothing of the node lives on."""
        self._end(name, with_all_below=True)

    def stop(self) -> None:
        """End every process that was started here."""
        for name in self.names:
            self._end(name, with_all_below=True)
        for name in ("slurmctld", "slurmdbd", "mariadbd", "munged"):
            self._end(name)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        if (ports := _reserved.pop(self.options.port, None)) is not None:
            os.close(ports)

    def processes_of_node(self, name: str) -> list[int]:
        """All processes of a node, its tasks among them."""
        pid = self.pid(name)
        return [] if pid is None else _below(pid)


def free_ports(count: int = 20, folder: Path = Path(f"/tmp/slurm-ports-{os.getuid()}")) -> int:  # noqa: B008, the same for all
    """The first of `count` ports that are free, and are this process's, and its clusters', until they end.

    They are reserved by a lock on a file of their block: two processes that look at the same moment find two blocks.
    """
    folder.mkdir(exist_ok=True)
    for first in range(15000, 32000, count):
        lock = os.open(folder / str(first), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(("", port))
        except OSError:  # locked, or taken by a program that knows nothing of the locks
            os.close(lock)
            continue
        _reserved[first] = lock
        return first
    raise OSError("no free ports")


_reserved: dict[int, int] = {}  # by first port, the open file whose lock reserves the block


class InUseError(RuntimeError):
    """A cluster runs in the folder, or is being started there."""


def _own_name(name: str, hosts: str) -> str:
    """Give this process a host name of its own; a user without that right needs user namespaces, else the node keeps the host's."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(_CLONE_NEWNS | _CLONE_NEWUTS | (_CLONE_NEWUSER if user else 0)):
        return os.strerror(ctypes.get_errno())
    if user:
        for file, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            Path(f"/proc/self/{file}").write_text(text)
    failed = libc.sethostname(name.encode(), len(name)) or libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
    failed = failed or libc.mount(hosts.encode(), b"/etc/hosts", None, _MS_BIND, None)
    return os.strerror(ctypes.get_errno()) if failed else "yes"


def _node(base: str, name: str) -> int:
    """One node: slurmd, and all that it starts stays below this process."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
    print("own host name:", _own_name(name, f"{base}/etc/hosts"), flush=True)
    child = subprocess.Popen([_program("slurmd"), "-D", "-N", name, "-f", f"{base}/etc/slurm.conf"])
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: child.send_signal(signal.SIGTERM))
    while True:
        try:
            os.wait()
        except ChildProcessError:
            return 0


def main() -> int:
    """The command line, for a cluster to try things on by hand."""
    if sys.argv[1:2] == ["_node"]:
        return _node(sys.argv[2], sys.argv[3])
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["start", "stop", "kill-node", "start-node"])
    parser.add_argument("base", type=Path)
    parser.add_argument("node", nargs="?", default="gpu01")
    asked = parser.parse_args()
    base = asked.base.resolve()
    if asked.command == "start":
        cluster = SlurmCluster(base, Options(port=free_ports()))
        try:
            cluster.start()
        except InUseError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        print(f"export SLURM_CONF={cluster.conf}")
    else:
        cluster = SlurmCluster.at(base)
        {"stop": cluster.stop, "kill-node": lambda: cluster.kill_node(asked.node), "start-node": lambda: cluster.start_node(asked.node)}[
            asked.command
        ]()
    return 0


if __name__ == "__main__":
    sys.exit(main())
