"""What the tests on a real Slurm share."""

from pathlib import Path

import pytest

from tests.support.slurm_bench import SweepOnSlurm
from tests.support.slurm_cluster import SlurmCluster


@pytest.fixture
def sweep(cluster: SlurmCluster, tmp_path: Path) -> SweepOnSlurm:
    return SweepOnSlurm(cluster, tmp_path)
