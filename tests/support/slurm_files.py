"""The files of the one-host Slurm of tests/support/slurm_cluster.py: slurm.conf and those beside it, from a few options."""

import getpass
import json
import os
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

CONF = Path("etc") / "slurm.conf"
_PLUGIN = """
function slurm_job_submit(job_desc, part_list, submit_uid)
    %s
    return slurm.SUCCESS
end
function slurm_job_modify(job_desc, job_rec, part_list, modify_uid)
    return slurm.SUCCESS
end
return slurm.SUCCESS
"""
NO_REQUEUE = 'job_desc.requeue = 0 slurm.log_user("NOTE: jobs are not requeued on this site")'


@dataclass
class Options:
    """How the cluster behaves."""

    port: int
    nodes: int = 3
    grace_seconds: int = 20  # of preemption
    user_signal: bool = True  # preempt_send_user_signal: a preempted job gets its --signal too, and not SIGTERM alone
    kill_wait_seconds: int = 10  # from SIGTERM to SIGKILL
    again_seconds: int = 5  # until a requeued job may start; Slurm's default is 120
    node_timeout_seconds: int = 5
    message_seconds: int = 5
    max_array_size: int = 1001
    cores: int = 64
    plugin: str = ""  # Lua that the site's job_submit plugin runs on each job_desc, such as NO_REQUEUE
    preempt_mode: str = "REQUEUE"  # of the partition gpu-preempt
    gather: str = "none"  # linux: what jobs use of cores and memory is looked at each second
    lines: dict[str, str] = field(default_factory=dict)  # of slurm.conf: parameter -> value, instead of the one here or beside them
    partitions: str = ""  # what the line of all partitions has as well, such as OverSubscribe=EXCLUSIVE


def write(base: Path, options: Options, names: Sequence[str]) -> None:
    """Write all files of a cluster of nodes of those names below `base`; the cluster takes changes when it is reconfigured."""
    b, o, me, host = base, options, getpass.getuser(), socket.gethostname()
    for name in ("etc", "run", "log", "state", "dev", "munge", *(f"spool/{n}" for n in names)):
        (b / name).mkdir(parents=True, exist_ok=True)
    for folder in (b, b / "munge"):
        folder.chmod(0o755)  # munged wants everybody to be able to reach its socket
    for i in range(4):  # gres.conf wants devices
        link = b / "dev" / f"nvidia{i}"
        if not link.is_symlink():
            link.symlink_to("/dev/null")
    key = b / "munge" / "key"
    if not key.exists():
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
    addresses = ",".join(f"127.0.1.{i}" for i in range(1, o.nodes + 1))
    ports = ",".join(str(o.port + 9 + i) for i in range(1, o.nodes + 1))
    hardware = f"CPUs={o.cores} Sockets=1 CoresPerSocket={o.cores} ThreadsPerCore=1 RealMemory=256000 Gres=gpu:a100:4"
    lines = [
        "ClusterName=mini",
        f"SlurmctldHost={host}(127.0.0.1)",
        f"SlurmctldPort={o.port}",
        f"SlurmUser={me}",
        f"SlurmdUser={me}",
        "AuthType=auth/munge",
        "CredType=cred/munge",
        f"AuthInfo=socket={b}/munge/sock,cred_expire={o.again_seconds}",
        f"StateSaveLocation={b}/state",
        f"SlurmdSpoolDir={b}/spool/%n",
        f"SlurmctldPidFile={b}/run/slurmctld.self",
        f"SlurmdPidFile={b}/run/slurmd.%n.self",
        f"SlurmctldLogFile={b}/log/slurmctld.log",
        f"SlurmdLogFile={b}/log/slurmd.%n.log",
        f"PlugStackConfig={b}/etc/plugstack.conf",
        "MpiDefault=none",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "SwitchType=switch/none",
        f"JobAcctGatherType=jobacct_gather/{o.gather}",
        "JobAcctGatherFrequency=task=1",
        "PropagateResourceLimits=NONE",
        "SlurmdParameters=config_overrides",
        *(["SlurmctldParameters=preempt_send_user_signal"] if o.user_signal else []),
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core_Memory",
        "SchedulerType=sched/backfill",
        "SchedulerParameters=bf_interval=1,sched_interval=2,sched_min_interval=0",
        "PriorityType=priority/basic",
        "JobRequeue=1",
        f"KillWait={o.kill_wait_seconds}",
        f"MessageTimeout={o.message_seconds}",
        "MinJobAge=300",
        "MaxJobCount=20000",
        f"MaxArraySize={o.max_array_size}",
        f"SlurmdTimeout={o.node_timeout_seconds}",
        "ReturnToService=2",
        "GresTypes=gpu",
        "PreemptType=preempt/partition_prio",
        f"PreemptMode={o.preempt_mode}",
        *(["JobSubmitPlugins=lua"] if o.plugin else []),
        "AccountingStorageType=accounting_storage/slurmdbd",
        "AccountingStorageHost=127.0.0.1",
        f"AccountingStoragePort={o.port + 1}",
        f"AccountingStoragePass={b}/munge/sock",
        "AccountingStorageTRES=gres/gpu,gres/gpu:a100",
        "AccountingStorageEnforce=associations,limits,qos",
        f"NodeName={','.join(names)} NodeHostname={host} NodeAddr={addresses} Port={ports} {hardware} State=UNKNOWN",
        f"PartitionName=DEFAULT Nodes={','.join(names)} MaxTime=2-0 DefaultTime=60 DefMemPerCPU=2000 State=UP {o.partitions}",
        "PartitionName=gpu Default=YES PriorityTier=10 PreemptMode=OFF",
        f"PartitionName=gpu-preempt PriorityTier=1 PreemptMode={o.preempt_mode} GraceTime={o.grace_seconds}",
    ]
    given = {name.lower() for name in o.lines}
    kept = [line for line in lines if line.partition("=")[0].lower() not in given]
    (b / CONF).write_text("\n".join([*kept, *(f"{name}={value}" for name, value in o.lines.items() if value), ""]))
    (b / "etc" / "gres.conf").write_text(f"NodeName={','.join(names)} Name=gpu Type=a100 File={b}/dev/nvidia[0-3]\n")
    (b / "etc" / "plugstack.conf").write_text("")
    (b / "etc" / "job_submit.lua").write_text(_PLUGIN % o.plugin)
    hosts = "".join(f"127.0.1.{i} {name}\n" for i, name in enumerate(names, 1))
    (b / "etc" / "hosts").write_text(Path("/etc/hosts").read_text() + hosts)
    database = b / "etc" / "slurmdbd.conf"
    database.write_text(
        f"AuthType=auth/munge\nAuthInfo=socket={b}/munge/sock\nDbdHost={host}\nDbdAddr=127.0.0.1\nDbdPort={o.port + 1}\n"
        f"SlurmUser={me}\nLogFile={b}/log/slurmdbd.log\nPidFile={b}/run/slurmdbd.self\n"
        f"StorageType=accounting_storage/mysql\nStorageHost=localhost\nStorageUser={me}\nStorageLoc=slurm_acct\n"
    )
    database.chmod(0o600)
    (b / "etc" / "options.json").write_text(json.dumps(asdict(o)))


def read(base: Path) -> Options:
    """The options with which `write` was called for `base`."""
    return Options(**json.loads((base / "etc" / "options.json").read_text()))
