"""The page of 25 tasks: each is one command, which test_docs_commands.py types, or three lines of Python, which run here."""

import re
import textwrap
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs.cluster import JobSpec
from jobs.config import compose_job
from jobs.run import run_job
from sweeps.spec.sweep import ScaleName, build_trials
from sweeps.state.folder import Sweep
from sweeps.state.view import View
from tests.support.documented import blocks, commands, page
from tests.support.reported import failed
from tests.support.tiny_sweep import sweep

SNIPPETS = [textwrap.dedent("\n".join(block.lines)) for block in blocks(page("tasks.md")) if block.language == "python"]


def test_there_are_25_tasks_each_of_one_command_or_three_lines() -> None:
    numbered = [int(n) for n in re.findall(r"^(\d+)\. ", page("tasks.md").read_text(), re.M)]
    assert numbered == list(range(1, 26))
    found = blocks(page("tasks.md"))
    assert len(found) == 25
    assert all(len([line for line in block.lines if line]) <= (3 if block.language == "python" else 1) for block in found)
    assert len([c for c in commands() if c.page == "tasks.md"]) + len(SNIPPETS) == 25


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of which two trials were trained and one has failed."""
    root = tmp_path_factory.mktemp("tasks")
    spec = sweep()
    trials = build_trials(spec, spec.paper, 2, "local", [])
    real = Sweep.of(spec, ScaleName.paper, trials, root / "runs" / "predictor_ablation-smoke")
    real.write()
    local = compose_job([]).cluster
    for number in (1, 3):
        trial = real.trials[number]
        assert run_job(JobSpec(trial.config, local, real.trial_dir(trial))) is not None
    failed(View(real), 4, "NonFiniteError: loss nan")
    (root / "my_images").mkdir()
    for i in range(3):
        Image.fromarray(np.full((20, 24, 3), 40 * i, np.uint8)).save(root / "my_images" / f"{i}.png")
    return root


SAID = {  # what each prints, in the order of the page
    "best()\nprint(best.configuration": r"(depth \d|pointwise) \d+\.",
    "groupby": r"mean +std +count",
    "history": r"\n1 +\d\.\d+",
    'state == "failed"': r"04-depth2-seed43 +NonFiniteError: loss nan",
    ".features(": r"\(3, \d+\)",
}


@pytest.mark.slow
@pytest.mark.xdist_group("runs of the tasks")
@pytest.mark.parametrize(("part", "said"), SAID.items(), ids=range(len(SAID)))
def test_the_lines_do_what_the_page_says(
    part: str, said: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    [code] = [text for text in SNIPPETS if part in text]
    monkeypatch.chdir(folder)
    exec(compile(code, "tasks.md", "exec"), {})  # noqa: S102, the page's own lines
    assert re.search(said, out := capsys.readouterr().out), out


def test_every_snippet_is_run() -> None:
    assert [sum(part in text for part in SAID) for text in SNIPPETS] == [1] * len(SAID)
