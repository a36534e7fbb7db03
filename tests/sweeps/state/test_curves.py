"""TensorBoard shows the trials of a sweep under their names."""

import os
from dataclasses import replace
from pathlib import Path

from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from sweeps.spec.sweep import ScaleName, Trial
from sweeps.state.curves import link, link_all
from sweeps.state.folder import Sweep


def sweep(path: Path) -> Sweep:
    trials = [Trial(i, f"depth {i + 1}", 42, {"epochs": 4}, f"run{i}") for i in range(3)]
    made = Sweep(path, "x", "?", ScaleName.smoke, "o", [], {}, trials)
    made.write()
    return made


def shown(folder: Path) -> list[str]:
    found = EventMultiplexer().AddRunsFromDirectory(str(folder / "tensorboard"))
    return sorted(found.Runs())


def test_tensorboard_shows_each_trial_under_its_name(tmp_path: Path) -> None:
    made = sweep(tmp_path)
    for trial in made.trials[:2]:
        EventFileWriter(str(made.run(trial).tensorboard)).close()
    link_all(made)
    assert shown(tmp_path) == ["00-depth1-seed42", "01-depth2-seed42"]
    os.rename(tmp_path, moved := tmp_path.with_name("moved"))
    assert shown(moved) == ["00-depth1-seed42", "01-depth2-seed42"]


def test_a_link_is_made_once_and_replaced_when_the_configuration_is_called_otherwise(tmp_path: Path) -> None:
    made = sweep(tmp_path)
    link(made, made.trials[0])
    link(made, made.trials[0])
    link(made, replace(made.trials[0], label="predictor.depth 1"))
    assert os.listdir(tmp_path / "tensorboard") == ["00-predictor.depth1-seed42"]
