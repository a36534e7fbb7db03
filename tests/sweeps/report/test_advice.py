"""Advice rests on what was measured: by sacct where there is one, else by the trainer's counters; where nothing tells there is none."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cnnjepa.run.folder import RunResult, RunStatus
from jobs.config import compose_job
from jobs.slurm.sacct import JobUse
from sweeps.report import usage
from sweeps.report.usage import Efficiency, advice_lines, all_of, clock, efficiency, requests, speed_line
from sweeps.state import claims
from sweeps.state.claims import Process, SlurmStart
from sweeps.state.folder import Sweep
from sweeps.state.submission import Submission
from sweeps.state.view import View
from tests.support.advised import LINES, end, planned
from tests.support.slurm_bench import SweepOnSlurm, needs_slurm
from tests.support.slurm_cluster import SlurmCluster

ROOT = Path(__file__).parents[3]


def submitted(made: Sweep, job: str, *overrides: str) -> None:
    """A submission of array `job`."""
    cluster = compose_job(["cluster=test_cluster", "micro_batch_size=16", "global_batch_size=64", *overrides]).cluster
    made_of = Submission(made.path, 1, "name", 3, 3, [], cluster, "code", Process.me(), time.time())
    made_of.create()
    made_of.write_job(job)


@pytest.fixture
def sacct(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Stands sacct, and squeue beside it, in front of what is installed: it prints the given lines, and notes what it was asked."""

    def stand(lines: str, status: int = 0) -> Path:
        folder, asked = tmp_path / "bin", tmp_path / "asked"
        folder.mkdir()
        (folder / "lines").write_text(lines)
        for name in ("sacct", "squeue"):
            (folder / name).write_text(f'#!/bin/sh\necho "$@" >> {asked}\ncat {folder}/lines\nexit {status}\n')
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        return asked

    return stand


def test_sacct_is_asked_once_for_all_and_tells_of_each(tmp_path: Path, sacct: Callable[..., Path]) -> None:
    asked = sacct(LINES)
    made = planned(tmp_path, "data.workers=8")
    for i, trial in enumerate(made.trials[:2]):
        end(made, trial, f"17_{i}", seconds=1100.0, images_per_second=400.0 + 100 * i, data_wait_share=0.2, peak_memory_mb=9000.0)
    view = View(made)
    found = all_of(view)
    lines = advice_lines(view)
    assert len(asked.read_text().splitlines()) == 1
    assert "-j 17_0,17_1 " in asked.read_text()
    second = found[made.trials[1].signature]
    assert (second.source, second.seconds, second.cores, second.limit_seconds) == ("sacct", 1440.0, 64, 57600.0)
    assert second.time_share == pytest.approx(0.025)
    assert second.cpu_share == pytest.approx(7200 / 1440 / 64)
    assert second.memory_mb == pytest.approx(4 * 3500000 / 1024)
    assert second.memory_share == pytest.approx(4 * 3500000 / 1024 / 256000)
    assert second.images_per_second_without_wait == pytest.approx(625)
    assert found[made.trials[0].signature].best_images_per_second == 500
    assert lines == [
        "used at most, by 2 completed runs (sacct): time 2 % of 16:00:00, memory 14 GB (5 % of 256), cores 8 % of 64",
        "speed: up to 500 images/s; the slowest run had 80 % of the best of its kind; 20.0 % of the time waiting for data, "
        "without it up to 625 images/s",
        "next time: time_limit_minutes=30 (instead of 960: shorter jobs start sooner), memory_gb_per_trial=17 (instead of 256), "
        "data.workers=16 (instead of 8: 20 % of the time waiting for data)",
    ]


def test_a_silent_accounting_leaves_the_counters(tmp_path: Path, sacct: Callable[..., Path]) -> None:
    sacct("Slurm accounting storage is disabled", status=1)
    made = planned(tmp_path, "device=cpu")
    submitted(made, "17", "time_limit_minutes=600")
    end(made, made.trials[0], "17_0", seconds=100.0, peak_memory_mb=500.0, images_per_second=40.0, data_wait_share=0.01)
    found = efficiency(View(made), made.trials[0])
    assert found is not None
    assert (found.source, found.limit_seconds, found.cores, found.cpu_share) == ("counters", 36000.0, 4, None)
    assert found.memory_mb == 2000  # four ranks
    assert found.memory_asked_mb == 8000
    assert found.gpu_utilisation is None
    lines = advice_lines(View(made))
    assert "(counters)" in lines[0]
    assert lines[0].endswith("cores 4")
    assert lines[-1] == "next time: time_limit_minutes=15 (instead of 600: shorter jobs start sooner), memory_gb_per_trial=3 (instead of 8)"


def test_a_job_that_others_share_is_not_compared_with_one_trial(tmp_path: Path, sacct: Callable[..., Path]) -> None:
    asked = sacct(LINES)
    made = planned(tmp_path)
    end(made, made.trials[0], "17_0", shared=True, seconds=100.0)
    found = efficiency(View(made), made.trials[0])
    assert found is not None
    assert found.source == "counters"
    assert not asked.exists()


def test_on_this_machine_nothing_was_asked_for_and_the_loader_alone_is_judged(tmp_path: Path) -> None:
    made = planned(tmp_path)
    assert advice_lines(View(made)) == []
    end(made, made.trials[0], seconds=60.0, peak_memory_mb=340.0, images_per_second=100.0, data_wait_share=0.01)
    assert efficiency(View(made), made.trials[1]) is None
    used, speed = advice_lines(View(made))
    assert used.endswith("peak memory of a process 340 MiB, cores 1")
    assert speed == "speed: up to 100 images/s; 1.0 % of the time waiting for data, without it up to 101 images/s"


def test_a_result_that_tells_nothing_of_waiting_has_its_speed_alone(tmp_path: Path) -> None:
    made = planned(tmp_path)
    end(made, made.trials[0], seconds=60.0, images_per_second=100.0)
    assert advice_lines(View(made))[1:] == ["speed: up to 100 images/s"]


def test_what_never_loads_an_image_has_no_speed(tmp_path: Path) -> None:
    made = planned(tmp_path)
    end(made, made.trials[0], seconds=60.0)
    assert len(advice_lines(View(made))) == 1


BASE = Efficiency("sacct", 3600.0, 36000.0, 0.1, 16, 0.9, 4000.0, 16000.0, 0.25, True, 9000.0, None, 0.02, 100.0, 102.0, 100.0)


@pytest.mark.parametrize(
    ("changes", "workers", "asked"),
    [
        ({}, 8, ["time_limit_minutes=75", "memory_gb_per_trial=5"]),
        ({"seconds": 3601.0}, 8, ["time_limit_minutes=90", "memory_gb_per_trial=5"]),  # a second more is a quarter of an hour more
        ({"limit_seconds": 4800.0}, 8, ["memory_gb_per_trial=5"]),  # 80 minutes: nothing to win
        ({"limit_seconds": 3000.0}, 8, ["time_limit_minutes=75", "memory_gb_per_trial=5"]),  # it took several jobs
        ({"limit_seconds": None, "memory_asked_mb": None}, 8, []),
        ({"limit_seconds": None, "memory_mb": None}, 8, []),
        ({"limit_seconds": None, "memory_mb": 15000.0}, 8, ["memory_gb_per_trial=18"]),  # nearly all of it
        ({"limit_seconds": None, "memory_mb": 13000.0}, 8, []),
        ({"limit_seconds": None, "memory_mb": None, "data_wait_share": 0.06}, 3, ["data.workers=6 and cores_per_trial=28"]),
        ({"limit_seconds": None, "memory_mb": None, "data_wait_share": 0.06}, 0, ["data.workers=1"]),
        ({"limit_seconds": None, "memory_mb": None, "data_wait_share": 0.001}, 8, ["data.workers=4"]),
        ({"limit_seconds": None, "memory_mb": None, "data_wait_share": 0.001}, 2, []),
        ({"limit_seconds": None, "memory_mb": None, "data_wait_share": None}, 8, []),
        ({"limit_seconds": None, "memory_mb": None, "cpu_share": 0.2}, 2, ["cores_per_trial=4"]),
        ({"limit_seconds": None, "memory_mb": None, "cpu_share": 0.3}, 2, ["cores_per_trial=8"]),  # a core for each rank more
        ({"limit_seconds": None, "memory_mb": None, "cpu_share": None}, 2, []),
        ({"limit_seconds": None, "memory_mb": None, "cpu_share": 0.2, "data_wait_share": 0.06}, 1, ["data.workers=2"]),
    ],
)
def test_a_request_follows_from_the_numbers_or_is_not_made(changes: dict[str, Any], workers: int, asked: list[str]) -> None:
    made = requests([replace(BASE, **changes)], 4, workers, [], "data.workers")
    assert [re.sub(r" \([^)]*\)", "", request) for request in made] == asked


def test_jobs_that_ran_out_of_memory_are_said() -> None:
    killed = JobUse("OUT_OF_MEMORY", 10.0, 60.0, 4, None, 16000.0, None)
    found = replace(BASE, limit_seconds=None, memory_mb=None)
    assert requests([found], 4, 2, [killed], "data.workers") == ["memory_gb_per_trial above 16 (1 jobs ran out of memory)"]


def test_a_gpus_utilisation_is_said_or_said_to_be_absent(tmp_path: Path) -> None:
    made = planned(tmp_path, "device=cuda")
    end(made, made.trials[0], seconds=60.0, peak_memory_mb=2048.0)
    assert advice_lines(View(made))[0].endswith("GPU utilization not reported, its tensors 2.0 GiB")
    end(made, made.trials[1], seconds=60.0, peak_memory_mb=2048.0, gpu_utilisation=0.83)
    assert advice_lines(View(made))[0].endswith("GPU busy 83 % of the time, its tensors 2.0 GiB")


def test_speed_names_the_slowest_of_its_own_kind() -> None:
    fast, slow, other = BASE, replace(BASE, images_per_second=70.0), replace(BASE, images_per_second=10.0, best_images_per_second=10.0)
    assert "the slowest run had 70 % of the best of its kind" in speed_line([fast, slow, other])


def test_the_best_of_a_kind_is_the_fastest_whenever_it_ran_and_of_a_kind_of_its_own(tmp_path: Path) -> None:
    made = planned(tmp_path)
    for trial, rate in zip(made.trials, (100.0, 300.0, 200.0), strict=True):
        end(made, trial, seconds=60.0, images_per_second=rate)
    view = View(made)
    assert [e.best_images_per_second for e in all_of(view).values()] == [300.0] * 3
    other = planned(tmp_path / "other", "data.train_limit=128")
    both = replace(made, trials=[*made.trials, other.trials[0]])
    end(both, other.trials[0], seconds=60.0, images_per_second=900.0)
    assert [e.best_images_per_second for e in all_of(View(both)).values()] == [300.0, 300.0, 300.0, 900.0]


def test_of_a_trial_in_several_jobs_time_is_added_up_and_what_was_asked_for_is_that_of_the_last(
    tmp_path: Path, sacct: Callable[..., Path]
) -> None:
    sacct(
        "17_0|TIMEOUT|01:00:00|01:00:00|02:00:00|4|1|8000M||\n17_0.0|TIMEOUT|01:00:00||02:00:00|4|1||1024000K|1\n"
        "18_0|COMPLETED|00:30:00|02:00:00|03:00:00|8|1|16000M||\n18_0.0|COMPLETED|00:30:00||03:00:00|8|1||512000K|1\n"
    )
    made = planned(tmp_path)
    first = SlurmStart("c", "17_0", 0, "gpu01", 4, "log", "code")
    assert claims.claim(made.trial_dir(made.trials[0]), 1, "d", 0, first)
    owned = claims.claim(made.trial_dir(made.trials[0]), 2, "d", 5, replace(first, job="18_0"))
    assert owned is not None
    with owned:
        made.run(made.trials[0]).prepare(made.trials[0].config)
        made.run(made.trials[0]).write_result(RunResult(RunStatus.completed, metrics={made.objective: 50.0}, step=20))
    found = efficiency(View(made), made.trials[0])
    assert found is not None
    assert (found.source, found.seconds, found.cores, found.limit_seconds, found.memory_asked_mb) == ("sacct", 5400.0, 8, 7200.0, 16000.0)
    assert found.memory_mb == 1000.0  # of the larger of the two
    assert found.cpu_share == pytest.approx((2 + 3) / (1 * 4 + 0.5 * 8))
    assert found.time_share == pytest.approx(0.75)


def test_a_trial_that_ends_while_advice_looks_waits_for_the_next_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = planned(tmp_path)
    end(made, made.trials[0], seconds=60.0)
    looked = usage.all_of

    def then_another_ends(view: View) -> dict[str, Efficiency]:
        found = looked(view)
        end(made, made.trials[1], seconds=60.0)
        return found

    monkeypatch.setattr(usage, "all_of", then_another_ends)
    assert advice_lines(View(made))[0].startswith("used at most, by 1 completed runs")


def test_times_are_read_off_a_clock() -> None:
    assert [clock(s) for s in (45.4, 119, 125, 43325)] == ["45 s", "119 s", "0:02:05", "12:02:05"]


def test_the_command_prints_it_and_imports_no_torch(tmp_path: Path) -> None:
    made = planned(tmp_path)
    end(made, made.trials[0], seconds=60.0, images_per_second=100.0, data_wait_share=0.3)
    code = (
        "import sys, runpy; sys.argv = ['sweeps', 'advice', sys.argv[1], '--json']\ntry: runpy.run_module('sweeps', run_name='__main__')\n"
    )
    code += "except SystemExit: pass\nassert not {'torch', 'optuna'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(made.path)], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    reported = json.loads(done.stdout)
    assert reported["lines"][-1] == "next time: data.workers=1 (instead of 0: 30 % of the time waiting for data) and cores_per_trial=2"
    assert reported["trials"][made.trials[0].signature]["data_wait_share"] == 0.3


@needs_slurm
@pytest.mark.slow
@pytest.mark.xdist_group("slurm-2")
def test_on_a_real_slurm_it_tells_what_the_jobs_used(cluster: SlurmCluster, tmp_path: Path) -> None:
    made = SweepOnSlurm(cluster, tmp_path, held=False)
    said = made.run("one", "epochs=10")
    assert "used at most, by 1 completed runs (sacct): time " in said, said
    assert "next time: time_limit_minutes=15 (instead of 30: shorter jobs start sooner), memory_gb_per_trial=" in said, said
    (reported,) = json.loads(made.ask("advice", "--json"))["trials"].values()
    assert (reported["source"], reported["cores"], reported["limit_seconds"], reported["memory_asked_mb"]) == ("sacct", 2, 1800.0, 8000.0)
    assert 0 < reported["cpu_share"] <= 1
    assert 2 * 100 < reported["memory_mb"] < 8000  # two ranks with torch in each
    assert 0 <= reported["data_wait_share"] < 1
