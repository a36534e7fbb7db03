"""A real MLflow server and a real TensorBoard show, over HTTP, the numbers of results.csv; an export is killed by SIGKILL meanwhile."""

import contextlib
import csv
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.cluster import JobSpec
from jobs.config import compose_job
from jobs.run import run_job
from sweeps.report.aggregate import COSTS
from sweeps.spec.sweep import Configuration, Scale, ScaleName, SweepSpec, Trial, build_trials
from sweeps.state import claims, curves
from sweeps.state.folder import Sweep
from tests.support.held import wait_until
from tests.support.tiny import OVERRIDES

pytestmark = [pytest.mark.nightly, pytest.mark.xdist_group("trackers")]
ROOT = Path(__file__).resolve().parents[3]
SMALL = [*OVERRIDES, "epochs=2", "log.tensorboard=true", "probes.at_epochs=[1]"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """Three runs that were trained, with their tables."""
    spec = SweepSpec("served", "Depth?", configurations=[Configuration({"method.predictor.depth": d}) for d in (1, 2, 3)])
    trials = build_trials(spec, Scale(SMALL, seeds=1), 1, "local", [])
    sweep = Sweep.of(spec, ScaleName.smoke, trials, tmp_path_factory.mktemp("runs") / "served-smoke")
    sweep.write()
    cluster = compose_job(OVERRIDES).cluster
    for trial in trials:
        with claims.claim(sweep.trial_dir(trial), 1, "driver", 0) or pytest.fail("claimed"):
            assert run_job(JobSpec(trial.config, cluster, sweep.trial_dir(trial)), lambda: False) is not None
    curves.link_all(sweep)
    return sweep


@contextlib.contextmanager
def served(words: Sequence[str], ready: str, log: Path) -> Iterator[str]:
    """A server at a port of this machine; yields its address and leaves no process."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    with open(log, "w") as file:
        line = [str(Path(sys.executable).parent / words[0]), *words[1:], "--host", "127.0.0.1", "--port", str(port)]
        child = subprocess.Popen(line, stdout=file, stderr=file, start_new_session=True, cwd=log.parent)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until(f"an answer of {words[0]}", lambda: answers(address + ready), lambda: child.poll() is None)
        yield address
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM)
        child.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)


def answers(url: str) -> bool:
    with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(url, timeout=5) as found:
        return found.status == 200
    return False


def got(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data, {"Content-Type": "application/json"}), timeout=60) as found:
        return json.load(found)


def numbers(made: Sweep, trial: Trial) -> dict[str, float]:
    """The scores and costs of a trial in results.csv."""
    row = next(r for r in csv.DictReader((made.path / "results.csv").open()) if r["signature"] == trial.signature)
    result = made.run(trial).result()
    assert result is not None
    return {name: float(row[name]) for name in (*result.metrics, *COSTS) if row[name]}


def exporting(made: Sweep, address: str) -> subprocess.Popen:
    line = [sys.executable, "-m", "sweeps", "export", str(made.path), "--to", "mlflow", "--experiment", "killed"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": address}
    return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_an_mlflow_server_shows_the_numbers_of_results_csv_though_the_export_was_killed(made: Sweep, tmp_path: Path) -> None:
    words = [
        "mlflow",
        "server",
        "--backend-store-uri",
        f"sqlite:///{tmp_path}/mlflow.db",
        "--artifacts-destination",
        str(tmp_path / "kept"),
    ]
    with served([*words, "--workers", "1"], "/health", tmp_path / "log") as address:
        api = f"{address}/api/2.0/mlflow"

        def runs() -> list[dict[str, Any]]:
            with contextlib.suppress(urllib.error.HTTPError):
                of = got(f"{api}/experiments/get-by-name?experiment_name=killed")["experiment"]["experiment_id"]
                return got(f"{api}/runs/search", {"experiment_ids": [of], "max_results": 100}).get("runs", [])
            return []

        first = exporting(made, address)
        wait_until("two of its runs", lambda: len(runs()) > 2, lambda: first.poll() is None)
        first.kill()
        first.communicate()
        assert 2 < len(runs()) < 4 or not all("sweep.digest" in str(r["data"]["tags"]) for r in runs())
        for said in ("added", "3 unchanged"):
            child = exporting(made, address)
            out, _ = child.communicate(timeout=300)
            assert child.returncode == 0, out
            assert said in out or "updated" in out
        assert "runs: 3 unchanged; in experiment killed of http" in out
        found = {r["info"]["run_name"]: r for r in runs()}
        assert sorted(found) == sorted(["served-smoke", *(t.name for t in made.trials)])
        assert len(runs()) == 4
        for trial in made.trials:
            data, id = found[trial.name]["data"], found[trial.name]["info"]["run_id"]
            shown = {m["key"]: m["value"] for m in data["metrics"]}
            expected = numbers(made, trial)
            assert {name: shown[name] for name in expected} == expected
            history = got(f"{api}/metrics/get-history?run_id={id}&metric_key=step/loss")["metrics"]
            losses = [(r["step"], r["loss"]) for r in made.run(trial).metrics() if r["kind"] == "step"]
            assert [(m["step"], m["value"]) for m in history] == losses
            files = got(f"{api}/artifacts/list?run_id={id}")["files"]
            assert {"config.yaml", "metrics.jsonl"} <= {f["path"] for f in files}


def test_tensorboard_shows_the_numbers_of_results_csv(made: Sweep, tmp_path: Path) -> None:
    """To the digits that its files have: they hold numbers of 32 bits."""
    if not (made.path / "results.csv").exists():
        from sweeps.report import tables
        from sweeps.state.view import View

        tables.write_all(View(made))
    with served(["tensorboard", "--logdir", str(made.path / "tensorboard")], "/data/environment", tmp_path / "log") as address:
        scalars = f"{address}/data/plugin/scalars"
        wait_until("all runs", lambda: sorted(got(f"{scalars}/tags")) == sorted(trial.name for trial in made.trials))
        for trial in made.trials:
            result = made.run(trial).result()
            assert result is not None
            row = numbers(made, trial)
            for name in result.metrics:
                asked = urllib.parse.urlencode({"run": trial.name, "tag": f"final/{name}"})
                (_, step, value), *more = got(f"{scalars}/scalars?{asked}")
                assert (step, value, more) == (result.step, float(np.float32(row[name])), []), name
