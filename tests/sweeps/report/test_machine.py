"""Advice never asks for more cores, memory or loader processes than the machines of the runs have."""

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnnjepa.run.files import sealed_json, write_atomic
from jobs.provenance import provenance
from jobs.slurm.sacct import JobUse
from sweeps.report.machine import Machine, machine_of
from sweeps.report.usage import Efficiency, requests
from sweeps.state.view import View
from tests.support import exported

BASE = Efficiency("sacct", 3600.0, 36000.0, 0.1, 16, 0.9, 4000.0, 16000.0, 0.25, True, 9000.0, None, 0.02, 100.0, 102.0, 100.0)
KILLED = JobUse("OUT_OF_MEMORY", 10.0, 60.0, 4, None, 16000.0, None)


def asked(lines: list[str], key: str) -> list[float]:
    return [float(number) for line in lines for number in re.findall(rf"\b{key}(?:=| above )([\d.]+)", line)]


@settings(max_examples=300, deadline=None)
@given(
    ranks=st.integers(1, 8),
    threads=st.integers(1, 16),
    spare=st.integers(0, 8),
    workers=st.integers(0, 16),
    memory=st.floats(10, 600_000),
    given_gb=st.integers(1, 512),
    more_gb=st.floats(0, 64),
    cpu=st.none() | st.floats(0, 1),
    waited=st.none() | st.floats(0, 1),
    killed=st.booleans(),
)
def test_no_request_exceeds_the_machine(
    ranks: int,
    threads: int,
    spare: int,
    workers: int,
    memory: float,
    given_gb: int,
    more_gb: float,
    cpu: float | None,
    waited: float | None,
    killed: bool,
) -> None:
    """The machine has at least what the run was given."""
    cores, machine = ranks * threads, Machine(ranks * threads + spare, given_gb + more_gb)
    found = replace(BASE, cores=cores, cpu_share=cpu, memory_mb=memory, memory_asked_mb=1000.0 * given_gb, data_wait_share=waited)
    lines = requests([found], ranks, workers, [KILLED] * killed, "data.workers", machine)
    assert machine.cores is not None
    assert machine.memory_gb is not None
    assert all(n <= machine.cores for n in asked(lines, "cores_per_trial"))
    assert all(n <= machine.memory_gb for n in asked(lines, "memory_gb_per_trial"))
    assert all(n < workers or ranks * (n + 1) <= machine.cores for n in asked(lines, "data.workers"))


def test_what_the_machine_lacks_is_not_asked_for() -> None:
    found = replace(BASE, limit_seconds=None, memory_mb=None, data_wait_share=0.5, cores=2)
    assert requests([found], 1, 1, [], "data.workers", Machine(4, 16)) == [
        "data.workers=2 (instead of 1: 50 % of the time waiting for data) and cores_per_trial=3"
    ]
    assert requests([found], 1, 1, [], "data.workers", Machine(2, 16)) == []
    full = replace(BASE, limit_seconds=None, memory_mb=15_900.0)
    assert requests([full], 4, 2, [KILLED], "data.workers", Machine(64, 16)) == [
        "less memory of a run, since its node has no more than 16 GB (1 jobs ran out of it)"
    ]


def test_the_least_of_the_machines_counts_and_here_what_this_process_may_use(tmp_path: Path) -> None:
    made = exported.swept(tmp_path)
    for trial, cores, memory in zip(made.trials[:2], (10_000, 20_000), (8.0, 4.0)):
        write_atomic(made.trial_dir(trial) / "provenance.json", sealed_json({"cores": cores, "memory_gb": memory}))
    here = len(os.sched_getaffinity(0))
    assert machine_of(View(made), made.trials[:2]) == Machine(here, 4.0)
    assert machine_of(View(made), made.trials[:2], nodes=2) == Machine(2 * here, 8.0)
    assert machine_of(View(made), made.trials[3:]) == Machine()
    (made.trial_dir(made.trials[0]) / "provenance.json").write_text("{")
    assert machine_of(View(made), made.trials[:1]) == Machine()


def test_a_run_records_what_its_machine_has() -> None:
    assert provenance()["memory_gb"] > 0.1


@pytest.mark.parametrize("machine", [Machine(), Machine(10**6, 10**6)])
def test_without_a_bound_nothing_changes(machine: Machine) -> None:
    found = replace(BASE, limit_seconds=None, memory_mb=15_000.0)
    assert requests([found], 4, 8, [], "data.workers", machine)[0].startswith("memory_gb_per_trial=18")
