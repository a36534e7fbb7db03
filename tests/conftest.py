"""What all tests share: one thread each, so that xdist's workers do not crowd the cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """On CI everything is installed: a skipped test there is a failure."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") and reporter is not None and reporter.stats.get("skipped") and session.exitstatus == 0:
        reporter.write_line("tests were skipped on CI, where nothing may be missing", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
