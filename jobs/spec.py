"""The nouns of a job: a machine park (ClusterProfile) and one run on it (JobSpec)."""

from dataclasses import dataclass
from pathlib import Path

from cnnjepa.config import TrainConfig


@dataclass
class ClusterProfile:
    """One machine park's facts; each file of slurm/cluster is one. Nothing here changes what a run computes."""

    name: str  # the file's name
    cores_per_slot: int = 1  # CPU threads of one trial
    gpus_per_slot: float = 0.0  # CUDA devices of one trial; a fraction shares a device
    memory_gb_per_slot: float = 2.0  # host memory that one trial may need
    max_parallel: int = 0  # trials at once; 0 means as many as cores, devices and memory allow
    runs_dir: str = "runs"  # where sweeps and single runs are kept, unless --runs-dir says otherwise


@dataclass(frozen=True)
class JobSpec:
    """What to train, on which machines, and where the run is kept."""

    train: TrainConfig
    cluster: ClusterProfile
    run_dir: Path
    retry_failed: bool = False


def validate_cluster(cluster: ClusterProfile) -> None:
    """Raise ValueError, naming key, rule and value, for a profile that no slot can run by."""
    rules = [
        (cluster.cores_per_slot >= 1, "cores_per_slot", "be at least 1", cluster.cores_per_slot),
        # A slot on this machine trains one rank.
        (0 <= cluster.gpus_per_slot <= 1, "gpus_per_slot", "lie in [0, 1]", cluster.gpus_per_slot),
        (0 < cluster.memory_gb_per_slot < float("inf"), "memory_gb_per_slot", "be positive", cluster.memory_gb_per_slot),
        (cluster.max_parallel >= 0, "max_parallel", "be at least 0", cluster.max_parallel),
    ]
    for holds, key, rule, value in rules:
        if not holds:
            raise ValueError(f"cluster.{key} must {rule}; got {value}")
