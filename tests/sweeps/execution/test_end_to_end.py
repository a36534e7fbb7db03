"""A sweep under real Ray Tune: to its table, stopped, killed -9 at several moments, with a failing trial, and twice at once."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import psutil
import pytest

from cnnjepa.run.folder import TIMING_KEYS
from jobs.cluster import ClusterProfile
from sweeps.execution import ray_tune
from sweeps.execution.ray_local import parallel_workers
from tests.support import forked
from tests.support.browser import PHONE, opened
from tests.support.held import wait_until
from tests.support.sample import sampled

ROOT = Path(__file__).parents[3]
# Each fixture of the module is made once: those who look at it run in one process.
UNDISTURBED, FAILING = (pytest.mark.xdist_group(f"{name} sweep under Ray") for name in ("undisturbed", "failing"))
SCRIPT = str(ROOT / "tests" / "support" / "tiny_sweep.py")


def command(runs: Path, *more: str) -> list[str]:
    return [sys.executable, SCRIPT, "--runs-dir", str(runs), *more]


def run(runs: Path, *more: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(runs, *more), cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)


def folder(runs: Path) -> Path:
    return runs / "tiny_sweep-smoke"


def rows(runs: Path) -> list[dict[str, str]]:
    """results.csv less what depends on the machine and the moment."""
    lines = csv.DictReader((folder(runs) / "results.csv").open())
    return [{k: v for k, v in line.items() if k not in TIMING_KEYS} for line in lines]


def completed_and_running(runs: Path) -> tuple[int, int]:
    """What `status --json` counts."""
    counts = json.loads(forked.run(["-m", "sweeps", "status", str(folder(runs)), "--json"]).stdout)["counts"]
    return counts["completed"], counts["running"]


def kill_a_worker(runs: Path) -> None:
    """The owner of the trial that has most of its steps before it, so that it does not let go meanwhile; until another has taken it up."""
    claimed = [p for p in folder(runs).glob("trials/*/claim/*.json") if not p.with_suffix(".released").exists()]
    claimed = [p for p in claimed if psutil.pid_exists(json.loads(p.read_text())["owner"]["pid"])]
    metrics = {p: p.parents[1] / "metrics.jsonl" for p in claimed}
    chosen = min(claimed, key=lambda p: metrics[p].read_bytes().count(b"\n") if metrics[p].exists() else 0)
    worker = psutil.Process(json.loads(chosen.read_text())["owner"]["pid"])
    assert worker.nice() == psutil.Process().nice()
    worker.kill()
    wait_until("another worker", lambda: max(chosen.parent.glob("*.json")) != chosen)


def pending(process: psutil.Process, number: int) -> bool:
    """Whether a signal waits to be delivered."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return any(int(line.split()[1], 16) >> (number - 1) & 1 for line in status.splitlines() if line.startswith(("SigPnd", "ShdPnd")))


def ray_processes() -> list[psutil.Process]:
    """Those of this machine's Ray; what runs in a Slurm job is another test's."""
    found = []
    for process in psutil.process_iter(["cmdline", "environ"]):
        line = " ".join(process.info["cmdline"] or [])
        if ("/tmp/cnnjepa-" in line or line.startswith("ray::")) and "SLURM_JOB_ID" not in (process.info["environ"] or {}):
            found.append(process)
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("undisturbed")
    done = run(runs)
    assert done.returncode == 0, done.stdout + done.stderr
    return runs


@pytest.mark.slow
@UNDISTURBED
def test_a_sweep_ends_with_its_table_its_files_and_no_process_left(undisturbed: Path) -> None:
    assert [(r["setting"], r["seed"], r["state"]) for r in rows(undisturbed)] == [
        (configuration, seed, "completed") for seed in ("42", "43") for configuration in ("depth 1", "depth 2", "pointwise")
    ]
    summary = list(csv.DictReader((folder(undisturbed) / "summary.csv").open()))
    assert [(s["setting"], s["linear.test_top1_n"]) for s in summary[3:]] == [("random resnet_small", "2"), ("chance level", "1")]
    assert [s["linear.test_top1_n"] for s in summary[:3]] == ["2", "2", "2"]
    assert (folder(undisturbed) / "ablation.png").stat().st_size > 5000
    for trial in (folder(undisturbed) / "trials").iterdir():
        assert {"claim", "config.yaml", "provenance.json", "metrics.jsonl", "checkpoints", "log", "result.json"} <= set(os.listdir(trial))


@pytest.mark.slow
@UNDISTURBED
def test_run_again_it_reruns_nothing_and_starts_no_ray(undisturbed: Path) -> None:
    files = {p: p.stat().st_mtime_ns for p in (folder(undisturbed) / "trials").rglob("*") if p.is_file()}
    done = forked.run(command(undisturbed)[1:])
    assert done.returncode == 0
    assert "at once" not in done.stdout
    assert "linear top-1, test" in done.stdout
    assert {p: p.stat().st_mtime_ns for p in (folder(undisturbed) / "trials").rglob("*") if p.is_file()} == files


@pytest.mark.slow
@UNDISTURBED
def test_the_views_can_be_deleted_and_rebuilt(undisturbed: Path) -> None:
    views = [folder(undisturbed) / name for name in ("results.csv", "summary.csv", "ablation.png")]
    before = [v.read_bytes() for v in views]
    for view in views:
        view.unlink()
    done = forked.run(["-m", "sweeps", "results", str(folder(undisturbed)), "--format", "markdown"])
    assert done.returncode == 0, done.stderr
    assert [v.read_bytes() for v in views] == before
    assert done.stdout.startswith("| configuration |")
    assert completed_and_running(undisturbed) == (6, 0)


def test_dry_run_starts_and_writes_nothing(tmp_path: Path) -> None:
    done = forked.run(command(tmp_path / "none", "--dry-run")[1:])
    assert done.returncode == 0
    assert done.stdout.count("waiting") == 6
    assert not (tmp_path / "none").exists()


def wait_for_steps(runs: Path, steps: int, child: subprocess.Popen) -> None:
    """Until the trials' metrics hold `steps` lines in all."""

    def done() -> bool:
        return sum(p.read_bytes().count(b"\n") for p in folder(runs).glob("trials/*/metrics.jsonl")) >= steps

    wait_until(f"step {steps}", done, lambda: child.poll() is None)


def starts_ray(child: subprocess.Popen) -> bool:
    """Whether Ray's first process is there."""
    return any(p.name().startswith("gcs_server") for p in psutil.Process(child.pid).children(recursive=True))


def kill_while_ray_starts(runs: Path) -> None:
    child = in_background(runs)
    wait_until("Ray's start", lambda: starts_ray(child), lambda: child.poll() is None)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def kill_at_step(runs: Path, steps: int) -> None:
    child = in_background(runs)
    wait_for_steps(runs, steps, child)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()


def in_background(runs: Path) -> subprocess.Popen:
    return subprocess.Popen(command(runs), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


KILLS = {
    "while Ray starts": [kill_while_ray_starts],
    "in the first trials": [partial(kill_at_step, steps=8)],
    "when some have ended": [partial(kill_at_step, steps=55)],
    "at all three moments": [kill_while_ray_starts, partial(kill_at_step, steps=8), partial(kill_at_step, steps=55)],
}


@UNDISTURBED
@pytest.mark.slow
@pytest.mark.parametrize("moment", sampled(list(KILLS), 1, "moments of a kill under Ray"))
def test_killed_9_it_ends_with_the_same_table_and_repeats_no_trial(undisturbed: Path, tmp_path: Path, moment: str) -> None:
    for kill in KILLS[moment]:
        kill(tmp_path)
    done = run(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert rows(tmp_path) == rows(undisturbed)
    resumed = 0
    for trial in (folder(tmp_path) / "trials").iterdir():
        log = (trial / "log" / "train.log").read_text()
        assert log.count("step 1/20 ") == 1, f"{trial.name} was run twice from the start:\n{log}"
        assert log.count("step 20/20 ") == 1
        resumed += log.count("resuming")
    assert resumed >= (moment != "while Ray starts")


@UNDISTURBED
@pytest.mark.slow
def test_a_worker_killed_9_costs_that_worker_alone(undisturbed: Path, tmp_path: Path) -> None:
    """The process of one worker dies, twice: the driver goes on, places another worker, and the trial resumes."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    child = subprocess.Popen(command(tmp_path), cwd=ROOT, text=True, **pipes)
    for steps in (8, 70):
        wait_for_steps(tmp_path, steps, child)
        kill_a_worker(tmp_path)
    out, _ = child.communicate(timeout=400)
    assert child.returncode == 0, out
    assert rows(tmp_path) == rows(undisturbed)
    claims = [len(list((t / "claim").glob("*.json"))) for t in (folder(tmp_path) / "trials").iterdir()]
    assert sum(claims) == 6 + 2


@UNDISTURBED
@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_resumes(undisturbed: Path, tmp_path: Path) -> None:
    child = subprocess.Popen(
        command(tmp_path), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    wait_for_steps(tmp_path, 10, child)
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does: to the whole group
    out, _ = child.communicate(timeout=120)
    assert child.returncode == 130
    assert "stopped: " in out
    assert "the same command resumes" in out
    assert "Traceback" not in out
    assert completed_and_running(tmp_path)[1] == 0
    assert not [p for p in ray_processes() if child.pid in [q.pid for q in p.parents()]]
    done = run(tmp_path)
    assert done.returncode == 0
    assert rows(tmp_path) == rows(undisturbed)


@pytest.mark.slow
def test_a_second_ctrl_c_ends_it_at_once_and_leaves_no_process(tmp_path: Path) -> None:
    child = subprocess.Popen(command(tmp_path), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    wait_for_steps(tmp_path, 5, child)
    driver = psutil.Process(child.pid)
    below = driver.children(recursive=True)
    assert below
    child.send_signal(signal.SIGINT)
    wait_until("first Ctrl-C", lambda: not pending(driver, signal.SIGINT))  # two that wait to be delivered are one
    child.send_signal(signal.SIGINT)
    assert child.wait(timeout=120) == 130
    assert not [p for p in below if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.nightly
@UNDISTURBED
@pytest.mark.slow
def test_a_cleaned_tmp_ends_the_command_with_one_line_and_loses_no_run(undisturbed: Path, tmp_path: Path) -> None:
    child = subprocess.Popen(command(tmp_path), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for_steps(tmp_path, 10, child)
    (private,) = Path("/tmp").glob(f"cnnjepa-{child.pid}-*")
    shutil.rmtree(private, ignore_errors=True)  # Ray writes meanwhile
    out, _ = child.communicate(timeout=200)
    assert child.returncode == 1
    assert out.splitlines()[-1].startswith(f"error: {private} must stay while trials run; got no such folder: ")
    assert "Traceback" not in out
    wait_until("the end of Ray", lambda: not [p for p in ray_processes() if str(private) in " ".join(p.info["cmdline"] or [])], seconds=60)
    done = run(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert rows(tmp_path) == rows(undisturbed)


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess]:
    runs = tmp_path_factory.mktemp("failing")
    return runs, run(runs, "diverging", "--seeds", "1")


@FAILING
@pytest.mark.slow
def test_the_page_of_a_sweep_is_whole_in_a_browser(failing: tuple[Path, subprocess.CompletedProcess]) -> None:
    runs = failing[0]
    assert str(folder(runs) / "report.html") in failing[1].stdout
    with opened(folder(runs) / "report.html") as page:
        assert page.complaints() == []
        assert page.empty_figures() == []
        assert "No configuration is significantly better than all others" in page.text("#answer")
        assert len(page.all("#trials tbody tr")) == 4
        page.click("#trials tbody tr")
        assert page.all("#trials tbody tr.chosen")
        assert "00-depth1-seed42" in page.text("#details h3")
        assert "20 steps" in page.text("#details")
        page.click("#clear")
        assert page.all("#trials tbody tr.chosen") == []
        signature = page.click_on_curve(1)
        assert [row.get_attribute("data-trial") for row in page.all("#trials tbody tr.chosen")] == [signature]
        bright = "return document.getElementById('curves').data.filter((t) => t.opacity > 0.5).map((t) => t.meta)"
        assert page.script(bright) == [signature]
        page.click("button[data-select]")
        assert "NonFiniteError" in page.text("#details")
        assert "Traceback" in page.text("#details pre")
        for metric in page.script("return [...document.querySelectorAll('#metric option')].map((o) => o.value)"):
            page.script("const m = document.getElementById('metric'); m.value = arguments[0]; m.dispatchEvent(new Event('change'))", metric)
            assert page.script("return document.getElementById('curves').data.length") >= 3, metric
        page.all("#filter")[0].send_keys("pointwise")
        assert [row.text.split(" ")[0] for row in page.all("#trials tbody tr") if row.is_displayed()] == ["pointwise"]
        assert page.pdf().count(b"/Type /Page\n") > 1
        assert page.complaints() == []


@FAILING
@pytest.mark.slow
def test_the_page_fits_a_phone(failing: tuple[Path, subprocess.CompletedProcess]) -> None:
    with opened(folder(failing[0]) / "report.html", PHONE) as page:
        assert page.script("return [innerWidth, document.documentElement.scrollWidth]") == [PHONE[0], PHONE[0]]
        assert page.empty_figures() == []
        assert max(page.script("return [...document.querySelectorAll('.js-plotly-plot')].map((p) => p.clientWidth)")) <= PHONE[0]
        assert page.all("#answer")[0].rect["y"] < PHONE[1] / 2  # seen without a finger's move


@FAILING
@pytest.mark.slow
def test_a_failing_trial_is_recorded_with_its_cause_and_stops_no_other(
    failing: tuple[Path, subprocess.CompletedProcess], tmp_path: Path
) -> None:
    shutil.copytree(failing[0], tmp_path, dirs_exist_ok=True)
    done = failing[1]
    assert done.returncode == 1
    states = {r["setting"]: (r["state"], r["cause"]) for r in rows(tmp_path)}
    assert [states[s][0] for s in ("depth 1", "depth 2", "pointwise", "lr 1e+30")] == ["completed"] * 3 + ["failed"]
    assert "NonFiniteError" in states["lr 1e+30"][1]
    assert "seed42: failed: NonFiniteError: loss" in done.stdout
    again = forked.run(command(tmp_path, "diverging", "--seeds", "1")[1:])
    assert again.returncode == 1
    assert "at once" not in again.stdout
    retried = run(tmp_path, "diverging", "--seeds", "1", "--retry-failed")
    assert retried.returncode == 1
    assert "at once" in retried.stdout
    assert len(list(folder(tmp_path).glob("trials/*/result.failed-1.json"))) == 1


@pytest.mark.nightly
@UNDISTURBED
@pytest.mark.slow
def test_two_commands_at_once_run_each_trial_once(undisturbed: Path, tmp_path: Path) -> None:
    pair = [subprocess.Popen(command(tmp_path), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    outs = [child.communicate(timeout=400)[0] for child in pair]
    assert [child.returncode for child in pair] == [0, 0], outs
    assert rows(tmp_path) == rows(undisturbed)
    for trial in (folder(tmp_path) / "trials").iterdir():
        assert (trial / "log" / "train.log").read_text().count("step 1/20 ") == 1
        assert len(list((trial / "claim").glob("*.json"))) == 1


def test_workers_fit_cores_memory_and_devices() -> None:
    profile = ClusterProfile("x", cores_per_trial=2, memory_gb_per_trial=4)
    assert parallel_workers(profile, cores=8, devices=0, memory_gb=100) == 4
    assert parallel_workers(profile, cores=8, devices=0, memory_gb=10) == 2
    assert parallel_workers(ClusterProfile("x", gpus_per_trial=0.5), cores=8, devices=1, memory_gb=100) == 2
    assert parallel_workers(ClusterProfile("x", max_parallel=1), cores=8, devices=0, memory_gb=100) == 1
    for key, machine in {
        "cores_per_trial": {"cores": 1, "devices": 0, "memory_gb": 100},
        "memory_gb_per_trial": {"cores": 8, "devices": 0, "memory_gb": 2.0},
    }.items():
        with pytest.raises(ValueError, match=f"{key} must fit this machine at least once; got"):
            parallel_workers(profile, **machine)


def test_folders_of_killed_commands_are_removed_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_tune, "_TEMPORARY", tmp_path)
    ended = subprocess.Popen(["true"])
    ended.wait()
    gone, ours, other = (tmp_path / f"cnnjepa-{name}-test" for name in (ended.pid, os.getpid(), "x"))
    for path in (gone, ours, other):
        path.mkdir()
    (gone / "file").touch()
    ray_tune.remove_abandoned()
    assert psutil.pid_exists(ended.pid) or sorted(tmp_path.iterdir()) == sorted([ours, other])
