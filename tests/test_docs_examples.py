"""The programs of docs/examples: hardly longer than the bare scripts that they were made of, and none loses by being killed."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from jobs.cli import stop_on_signals
from tests.support.killed_run import EXAMPLES, attempt, configured, killed_and_resumed, loaded, scores

# What is swept: the files of the example, of which the first has a bare script of the same name.
FILES = {
    "pytorch_digits": ("pytorch_digits.py",),
    "lightning_digits": ("lightning_digits.py",),
    "sklearn_digits": ("sklearn_digits.py",),
    "shell_walk": ("walk.sh", "shell_walk.py"),
    "hydra_sweep": ("hydra_digits.py", "hydra_sweep.py"),
}
MOST_LINES = 10


def lines(*files: Path) -> int:
    return sum(bool(line.strip()) for file in files for line in file.read_text().splitlines())


@pytest.mark.parametrize("name", FILES)
def test_an_example_is_at_most_ten_lines_longer_than_the_bare_script(name: str) -> None:
    first, *more = FILES[name]
    bare = EXAMPLES / "bare" / first
    assert lines(EXAMPLES / first, *(EXAMPLES / other for other in more)) <= lines(bare) + MOST_LINES
    assert "sweeps" not in bare.read_text()
    assert "cnnjepa" not in (EXAMPLES / first).read_text()


def test_every_program_of_the_folder_is_an_example() -> None:
    assert {p.name for p in EXAMPLES.iterdir() if p.is_file()} == {file for files in FILES.values() for file in files}
    assert (EXAMPLES / "conf" / "digits.yaml").read_text() == (EXAMPLES / "bare" / "conf" / "digits.yaml").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shell_walk", pytest.param("hydra_sweep", marks=pytest.mark.nightly)])
def test_a_command_that_is_killed_three_times_ends_like_an_undisturbed_one(name: str, tmp_path: Path) -> None:
    _, config = configured(loaded(EXAMPLES / f"{name}.py").SWEEP, "epochs=5")
    whole = attempt(config, tmp_path / "whole", 1)
    assert whole is not None
    again, _ = killed_and_resumed(config, tmp_path / "killed", 3, seed=1)
    assert (again.status, again.metrics) == (whole.status, whole.metrics)
    assert scores(tmp_path / "killed") == scores(tmp_path / "whole")


@pytest.mark.nightly
@pytest.mark.slow
def test_lightning_that_is_killed_three_times_ends_like_an_undisturbed_one(tmp_path: Path) -> None:
    _, config = configured(loaded(EXAMPLES / "lightning_digits.py").SWEEP, "epochs=6")
    whole = attempt(config, tmp_path / "whole", 1)
    assert whole is not None
    again, attempts = killed_and_resumed(config, tmp_path / "killed", 3, seed=6)  # in epochs 1, 4 and 6
    assert attempts == 4
    assert (again.status, again.metrics) == (whole.status, whole.metrics)
    assert scores(tmp_path / "killed") == scores(tmp_path / "whole")


@pytest.mark.nightly
@pytest.mark.slow
def test_lightning_that_exits_at_sigterm_within_an_epoch_is_stopped_and_ends_like_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, config = configured(loaded(EXAMPLES / "lightning_digits.py").SWEEP, "epochs=5")
    whole = attempt(config, tmp_path / "whole", 1)
    assert whole is not None

    def ends(self: Any, *_: Any) -> None:
        if self.current_epoch == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, stop_on_signals() as stop:
        patch.setattr("pytorch_lightning.LightningModule.on_train_batch_start", ends)
        assert attempt(config, tmp_path / "stopped", 1, stop=stop) is None
    again = attempt(config, tmp_path / "stopped", 2)
    assert again is not None
    assert (again.status, again.metrics) == (whole.status, whole.metrics)
    assert scores(tmp_path / "stopped") == scores(tmp_path / "whole")
