"""Plan a run on the user's own data: identify them, and compare them with those of earlier runs.

A run whose data have changed since it began is not resumed. One of version 0.1 did not record them,
and starts again too.
"""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from cnnjepa.run import checkpoint
from cnnjepa.run.folder import RunFolder, RunStatus
from cnnjepa.run.identity import DEFAULT_TASK, from_dict, identity, lookup, put, signature, to_dict
from cnnjepa.run.ranks import Device, broadcast_object, joined
from jobs.cluster import JobSpec
from jobs.config import default_run_dir
from jobs.task import Task, task_of
from jobs.trials import run_folder


def apart_from_data(config: Any) -> dict[str, Any]:
    """Return what identifies `config` but for its data's fingerprint and folder."""
    values, task = identity(config), task_of(config)
    for key in (task.KEYS[what] for what in ("fingerprint", "data_root") if what in task.KEYS):
        *path, last = key.split(".")
        (lookup(values, ".".join(path)) if path else values).pop(last, None)
    return values


def data_of(config: Any) -> str:
    """Return the fingerprint of a configuration's data, "" without one."""
    return str(task_of(config).get(config, "fingerprint", ""))


def with_weights_of_a_trial(config: Any) -> Any:
    """Return `config` with the run folder of the trial whose weights it starts from, where it names one as SWEEP_FOLDER/TRIAL."""
    task = task_of(config)
    source = str(task.get(config, "weights", ""))
    if not source or Path(source).exists():
        return config
    found = run_folder(Path(source), task.KEYS["weights"])
    if not found.is_dir():
        return config
    values = to_dict(config)
    put(values, task.KEYS["weights"], str(found))
    return from_dict(values)


def planned(job: JobSpec) -> tuple[JobSpec, list[str]]:
    """Return `job` with its data identified, and lines to show.

    Raise ValueError if the data cannot be read, or if the run has begun on other data and the user
    has not chosen what to do. Several ranks call this within `joined`; the main rank looks.
    """
    task = task_of(job.train)
    if "fingerprint" not in task.KEYS:
        return job, []
    found, refused = None, ""
    with joined(task.get(job.train, "device", Device.cpu)) as ranks:
        if ranks.is_main:
            try:
                found = _planned(job, task)
            except (ValueError, OSError) as error:
                refused = str(error)
        if refused := broadcast_object(refused, ranks):
            raise ValueError(refused)
        found = broadcast_object(found, ranks)
    assert found is not None
    return found


def _planned(job: JobSpec, task: Task) -> tuple[JobSpec, list[str]]:
    (train,), lines = task.identified([with_weights_of_a_trial(job.train)])
    names_none = job.run_dir == default_run_dir(job.cluster, job.train)
    new = replace(job, train=train, run_dir=default_run_dir(job.cluster, train) if names_none else job.run_dir)
    if not data_of(train):
        return new, lines
    folders = [
        RunFolder(path) for path in (job.run_dir.parent.glob("*") if names_none else [job.run_dir]) if (path / "config.yaml").is_file()
    ]
    if any(folder.path == new.run_dir and _is_of(folder, train) for folder in folders):
        return new, lines
    about = ""  # the newest of them
    for folder in sorted(folders, key=lambda folder: (folder.path / "config.yaml").stat().st_mtime):
        if (held := _same_but_for_data(folder, train, task)) is not None and data_of(held) != data_of(train):
            about = _compared(new, folder, data_of(held))
    return new, [*lines, about] if about else lines


def _is_of(folder: RunFolder, config: Any) -> bool:
    with suppress(ValueError):
        return signature(folder.config()) == signature(config)
    return False


def _same_but_for_data(folder: RunFolder, train: Any, task: Task) -> Any | None:
    """Return the configuration in `folder` if it is `train`'s but for what the folder of its data held then."""
    with suppress(ValueError):  # a folder that cannot be read, or of another task
        held = folder.config()
        places = [Path(task.get(config, "data_root", "")).resolve() for config in (held, train)]
        if places[0] == places[1] and apart_from_data(held) == apart_from_data(train):
            return held
    return None


def _compared(new: JobSpec, earlier: RunFolder, then: str) -> str:
    """Return a line about an earlier run on other data; raise ValueError if the user must choose what to do."""
    result, now = earlier.result(), data_of(new.train)
    completed = result is not None and result.status is RunStatus.completed
    begun = next((found.step for found in checkpoint.find(earlier.checkpoints)), 0)
    named = earlier.path == new.run_dir
    if named or (then and begun and not completed and not new.start_again):
        remedy = "give another run_dir" if named else "begin a new run with start_again=true"
        raise ValueError(f"{must_hold(new.train, str(earlier.path), then, now)} to resume it from step {begun}, or {remedy}")
    what = then or not_recorded(new.train)
    return f"this is a new run on {now}; {earlier.path} {'completed' if completed else 'began'} on {what}"


def kind_of_data(config: Any) -> str:
    """Return what the data of a configuration are called: images only where its trainer is CNN-JEPA's."""
    return "images" if task_of(config).name == DEFAULT_TASK else "data"


def not_recorded(config: Any) -> str:
    """Return what a run is said to have begun on that did not record its data, as version 0.1 did not."""
    what = kind_of_data(config)
    return f"{what} that version 0.1 did not record" if what == "images" else f"{what} that were not recorded"


def must_hold(config: Any, who: str, then: str, now: str) -> str:
    """Return the rule that `who` goes on with the data `then`, the data `now`, and what restores the former."""
    keys, kind = task_of(config).KEYS, kind_of_data(config)
    key, what = keys.get("data_root", keys["fingerprint"]), then or f"which {not_recorded(config).partition(' that ')[2]}"
    compared = [text.split()[-2:-1] for text in (then, now)]  # of images: listing or content
    restore = "compare them in the same way" if then and kind == "images" and compared[0] != compared[1] else "restore them"
    return f"{key} must hold the {kind} that {who} began with, {what}; got {now}: {restore}"
