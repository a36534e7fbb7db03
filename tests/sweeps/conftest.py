"""The one-host Slurm that tests of sweeps share."""

from collections.abc import Iterator

import pytest

from tests.slurm_cluster import SlurmCluster
from tests.sweeps.slurm_bench import clean_cluster, shared_cluster


@pytest.fixture(scope="session")
def shared_slurm() -> Iterator[SlurmCluster]:
    with shared_cluster() as made:
        yield made


@pytest.fixture
def cluster(shared_slurm: SlurmCluster) -> Iterator[SlurmCluster]:
    """For one test, which finds it with its own options and leaves nothing running on it."""
    with clean_cluster(shared_slurm) as made:
        yield made
