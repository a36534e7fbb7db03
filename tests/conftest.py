"""What all tests share: one thread each, so that xdist's workers do not crowd the cores, and the same random numbers in any order."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

if TYPE_CHECKING:
    from tests.support.slurm_cluster import SlurmCluster


def _same_numbers() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_slurm() -> "Iterator[SlurmCluster]":
    """The one-host Slurm of this process."""
    from tests.support.slurm_bench import started_cluster
    from tests.support.slurm_cluster import free_ports
    from tests.support.slurm_files import Options

    with started_cluster(Options(port=free_ports(), gather="linux")) as made:
        yield made


@pytest.fixture
def cluster(shared_slurm: "SlurmCluster") -> "Iterator[SlurmCluster]":
    """For one test, which finds it with its own options and leaves nothing running on it."""
    from tests.support.slurm_bench import clean_cluster

    with clean_cluster(shared_slurm) as made:
        yield made


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """A fixture draws the same numbers whichever test asks for it first."""
    _same_numbers()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    """A test draws the same numbers whether its fixtures were made for it or for a test before it."""
    _same_numbers()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Before the marks that the command line asks for are looked at."""
    from tests.support.sample import leave_the_rest_to_nightly, long_tests

    leave_the_rest_to_nightly(items, long_tests(), whole_files=not any("::" in word for word in config.args))


class Order:
    """The last word on the order, after the shuffle."""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        from tests.support.sample import long_ones_first, long_tests

        long_ones_first(items, long_tests())


def pytest_configure(config: pytest.Config) -> None:
    """Add what a single module cannot hold twice: a second hook of one name."""
    config.pluginmanager.register(Order())


def pytest_collection_finish(session: pytest.Session) -> None:
    """Fail where pytest and xdist do not understand each other: tests of one group would make its fixture once a worker."""
    if session.config.getoption("loadgroup", False):
        alone = [item.nodeid for item in session.items if item.get_closest_marker("xdist_group") and "@" not in item.nodeid]
        if alone:
            raise pytest.UsageError(f"pytest-xdist ignores xdist_group with pytest {pytest.__version__}: {alone[0]}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """On CI everything is installed: a skipped test there is a failure."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") and reporter is not None and reporter.stats.get("skipped") and session.exitstatus == 0:
        reporter.write_line("tests were skipped on CI, where nothing may be missing", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
