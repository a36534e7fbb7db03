"""Identify the user's own data when a sweep is planned, and compare them with those that it began with."""

import argparse
import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from jobs.planned import apart_from_data, data_of, must_hold, not_recorded, with_weights_of_a_trial
from jobs.task import task_of
from sweeps.spec.sweep import Trial
from sweeps.state.folder import Sweep


class PlannedData:
    """What planning a sweep has found out about its data."""

    def __init__(self, asked: argparse.Namespace) -> None:
        """Take the command line."""
        self._asked = asked
        self.lines: list[str] = []  # to show
        self.started_again = False  # whether a person has chosen to run all trials on other data
        self.missing = ""  # why the run IDs are unknown, in a dry run without the data

    def identified(self, configs: Sequence[Any]) -> Sequence[Any]:
        """Return `configs` with their data identified; raise ValueError if these cannot be read."""
        if not configs:
            return configs
        try:
            found, lines = task_of(configs[0]).identified([with_weights_of_a_trial(config) for config in configs])
        except (ValueError, OSError) as error:
            if not self._asked.dry_run:
                raise
            self.missing = str(error)
            return configs
        self.lines += lines
        return found

    def compare(self, sweep: Sweep) -> None:
        """Raise ValueError if the sweep in the folder has begun on other data, unless all trials are to run on these."""
        if self.missing or not (sweep.path / "sweep.json").exists():
            return
        for then, config in _changed(Sweep.load(sweep.path), sweep):
            now = data_of(config)
            if then and not self._asked.start_again:
                said = must_hold(config, f"the sweep in {sweep.path}", then, now)
                raise ValueError(f"{said} to go on, or run all trials on these with --start-again")
            self.started_again = self._asked.start_again
            self.lines.append(f"all trials run on {now}; before on {then or not_recorded(config)}")
            return


def _changed(before: Sweep, now: Sweep) -> list[tuple[str, Any]]:
    """Return the data of trials before, and the configurations now that differ from them in nothing else."""
    if not any(map(_is_identified, [*before.trials, *now.trials])):
        return []  # without building a configuration: its method would import torch
    ours, same = {_key(trial): trial.config for trial in now.trials}, {trial.signature for trial in now.trials}
    others = [trial for trial in before.trials if trial.signature not in same and trial.known_config is not None]
    return [(data_of(trial.config), ours[key]) for trial in others if (key := _key(trial)) in ours]


def _is_identified(trial: Trial) -> bool:
    with suppress(ValueError):  # one of 0.1 lacks the key
        return bool(task_of(trial.values).value(trial.values, "fingerprint", ""))
    return False


def _key(trial: Trial) -> str:
    return json.dumps(apart_from_data(trial.config), sort_keys=True)
