"""A search under real Ray Tune: pruned and completed trials, killed -9 twice, and taken up without early stopping."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cnnjepa.run.folder import TIMING_KEYS
from tests.support import forked
from tests.support.browser import opened
from tests.support.held import wait_until
from tests.support.sample import sampled

ROOT = Path(__file__).parents[3]
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("search under Ray")]


def command(runs: Path, *more: str) -> list[str]:
    own = [str(ROOT / "tests" / "support" / "tiny_search.py"), "--runs-dir", str(runs), "--eta", "2", "cluster.max_parallel=1"]
    return [sys.executable, *own, *more]


def run(runs: Path, *more: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command(runs, *more), cwd=ROOT, capture_output=True, text=True, timeout=400, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def folder(runs: Path) -> Path:
    return runs / "tiny_search-smoke"


def rows(runs: Path) -> list[dict[str, str]]:
    """results.csv less what depends on the machine and the moment."""
    lines = csv.DictReader((folder(runs) / "results.csv").open())
    return [{k: v for k, v in line.items() if k not in TIMING_KEYS} for line in lines]


def choices(runs: Path) -> list[dict]:
    return [json.loads(p.read_text()) for p in sorted((folder(runs) / "points").iterdir())]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    runs = tmp_path_factory.mktemp("undisturbed")
    return runs, run(runs)


def test_a_search_ends_with_pruned_and_completed_trials_and_says_so(undisturbed: tuple[Path, str]) -> None:
    runs, said = undisturbed
    states = [r["state"] for r in rows(runs)]
    assert set(states) == {"pruned", "completed"}
    assert len(choices(runs)) == len(states) - 1
    assert rows(runs)[0]["setting"].startswith("baseline: lr ")
    assert "configurations were pruned and are not shown; see summary.csv" in " ".join(said.split())
    pruned = next(r for r in rows(runs) if r["state"] == "pruned")
    assert "is not among the best 1/2 of" in pruned["cause"]
    status = forked.run(["-m", "sweeps", "status", str(folder(runs))]).stdout
    assert "rungs: epoch 1: " in status
    assert "best so far by linear.holdout_top1: " in status


# When the search is under way; in the middle of a trial; at both moments.
KILLS = [*sampled([(2,), (5,)], 1, "trials after which a search is killed"), pytest.param((2, 5), marks=pytest.mark.nightly)]


@pytest.mark.parametrize("kills", KILLS, ids=str)
def test_killed_9_at_parallelism_1_it_ends_with_the_same_results(
    undisturbed: tuple[Path, str], tmp_path: Path, kills: tuple[int, ...]
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    for trials in kills:
        child = subprocess.Popen(command(tmp_path), cwd=ROOT, start_new_session=True, env=environment, **quiet)

        def under_way(ended: int = trials) -> bool:
            running = [t for t in folder(tmp_path).glob("trials/*") if not (t / "result.json").exists()]
            enough = len(list(folder(tmp_path).glob("trials/*/result.json"))) >= ended
            return enough and any((t / "metrics.jsonl").exists() for t in running)

        wait_until(f"{trials} trials and another one begun", under_way, lambda child=child: child.poll() is None)  # type: ignore[misc]
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    run(tmp_path)
    assert choices(tmp_path) == choices(undisturbed[0])
    assert rows(tmp_path) == rows(undisturbed[0])


@pytest.fixture(scope="module")
def taken_up(undisturbed: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of it, after the same command without early stopping."""
    runs = tmp_path_factory.mktemp("taken-up")
    shutil.copytree(undisturbed[0], runs, dirs_exist_ok=True)
    run(runs, "--early-stopping", "none")
    return runs


@pytest.mark.nightly
def test_what_was_pruned_is_trained_to_its_end_where_nothing_is_stopped_any_more(undisturbed: tuple[Path, str], taken_up: Path) -> None:
    before = {r["signature"]: r for r in rows(undisturbed[0])}
    after = {r["signature"]: r for r in rows(taken_up)}
    assert {r["state"] for r in after.values()} == {"completed"}
    assert before.keys() <= after.keys()
    pruned = next(s for s, r in before.items() if r["state"] == "pruned")
    log = (folder(taken_up) / "trials" / pruned / "log" / "train.log").read_text()
    assert "resuming" in log
    assert log.count("step 1/48 ") == 1


@pytest.mark.nightly
def test_the_page_of_a_search_holds_optunas_figures(taken_up: Path) -> None:
    """Of that one, since as many runs have completed as there are."""
    with opened(folder(taken_up) / "report.html") as page:
        assert page.complaints() == []
        assert page.empty_figures() == []
        headings = page.text("h3").splitlines()
        kinds = [h.partition(":")[0] for h in headings]
        wanted = ["Optimization history", "Probes during training, including pruned runs", "Slice", "Contours"]
        assert [k for k in dict.fromkeys(kinds) if k in wanted] == wanted
        assert "he configuration without changes" in page.text("#answer")
