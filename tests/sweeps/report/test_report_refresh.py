"""The page while a sweep runs: when it is written again, and what a fault of it ends."""

import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from sweeps import __main__ as readers
from sweeps.execution import rebuilding
from sweeps.execution.monitor import conclude
from sweeps.execution.rebuilding import Rebuilding, rebuild
from sweeps.report import html
from tests.support.reported import CLEAR, made

ROOT = Path(__file__).parents[3]


def test_a_fault_of_the_page_is_one_line_that_tells_where_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made(tmp_path, CLEAR)
    monkeypatch.setattr(html, "scores_figure", lambda *_: {}["classes"])
    monkeypatch.setattr(sys, "argv", ["sweeps", "report", str(tmp_path)])
    assert readers.main() == 1
    said = capsys.readouterr().err
    assert re.fullmatch(
        r"error: KeyError: 'classes' \(test_report_refresh\.py, line \d+\), a bug in the report and not in the sweep\n", said
    )


def test_a_page_is_made_again_while_a_sweep_runs_when_something_has_changed(tmp_path: Path) -> None:
    made(tmp_path, CLEAR)
    page = tmp_path / "report.html"
    kept = Rebuilding(tmp_path, first_seconds=0.0, every_seconds=0.0)
    kept.look("3 completed")
    process = kept._process
    assert process is not None
    kept.look("4 completed")
    assert kept._process is process  # one at a time
    assert process.wait(300) == 0
    assert page.read_text().endswith("</html>\n")
    kept.look("3 completed")
    assert kept._process is process  # nothing has changed
    kept.close()  # of one that has ended
    early = Rebuilding(tmp_path)
    early.look("3 completed")
    assert early._process is None
    early.close()


@pytest.mark.parametrize(("before", "ended_by"), [("", signal.SIGTERM), ("signal.signal(15, signal.SIG_IGN);", signal.SIGKILL)])
def test_a_page_in_the_making_is_ended_with_its_watcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, ended_by: signal.Signals
) -> None:
    """Something that would never end stands in for the report's command, so that it is surely at work."""
    begun = tmp_path / "begun"
    code = f"import pathlib, signal, time; {before} pathlib.Path({str(begun)!r}).touch(); time.sleep(3600)"
    monkeypatch.setattr(rebuilding, "_command", lambda folder: [sys.executable, "-c", code])
    monkeypatch.setattr(rebuilding, "_ENDS_WITHIN_SECONDS", 60.0 if ended_by is signal.SIGTERM else 0.1)
    kept = Rebuilding(tmp_path, first_seconds=0.0)
    kept.look("4 completed")
    process = kept._process
    assert process is not None
    try:
        while not begun.exists():
            assert process.poll() is None
            time.sleep(0.02)
        assert os.getpriority(os.PRIO_PROCESS, process.pid) == 10
        kept.close()
        assert process.returncode == -ended_by
    finally:
        process.kill()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["begun"]


def test_a_page_that_cannot_be_made_is_said_in_a_line_and_ends_no_sweep(tmp_path: Path) -> None:
    view = made(tmp_path, {s: scores[:1] for s, scores in CLEAR.items()}, seeds=1)
    (tmp_path / "report.html").mkdir()
    console = Console(file=io.StringIO(), width=200)
    assert conclude(view, console) == 0
    last = console.file.getvalue().splitlines()[-1]  # type: ignore[attr-defined]
    assert last.startswith(f"{tmp_path}/report.html: not written: {tmp_path}/report.html must be accessible; got Is a directory: move ")
    assert last.endswith(f"; the results are complete without it; to write it: python -m sweeps report {tmp_path}")
    (tmp_path / "report.html").rmdir()
    assert rebuild(tmp_path) == ""
    assert (tmp_path / "report.html").is_file()


def test_who_only_watches_imports_neither_plotly_nor_optuna(tmp_path: Path) -> None:
    """Nor torch, which a look at the configurations of trials that are to run would need: Ray's driver on a node has no room for it."""
    sweep = made(tmp_path, CLEAR).sweep
    for trial in sweep.trials[:2]:
        sweep.run(trial).prepare(trial.config)
        (sweep.trial_dir(trial) / "result.json").unlink()
    heavy = "('plotly', 'optuna', 'torch', 'scipy')"
    look = f"status_of(View.here(Sweep.load(Path({str(tmp_path)!r}))))['counts']['waiting'] == 2 or sys.exit('they are not waiting')"
    code = "\n".join(
        [
            "import sys, sweeps.execution.monitor, sweeps.__main__",
            "from pathlib import Path",
            "from sweeps.report.status import sweep_status as status_of",
            "from sweeps.state.folder import Sweep",
            "from sweeps.state.view import View",
            look,
            f"print([m for m in {heavy} if m in sys.modules])",
        ]
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True, env=environment)
    assert done.stdout.strip() == "[]"
