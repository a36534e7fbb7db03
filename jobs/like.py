"""Write a run as the overrides that make it alone, and expand `jobs.pretrain --like TRIAL` and `--weights-from` to them."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from cnnjepa.run.folder import RunFolder
from cnnjepa.run.identity import DEFAULT_TASK, differences, from_dict, identity, leaves, lookup, signature, task_name, to_dict
from jobs import program
from jobs.cluster import ClusterProfile, JobSpec
from jobs.config import compose_job
from jobs.task import Task, task_of
from jobs.trials import recorded, run_folder

_OF_A_JOB = ("cluster", "run_dir", "retry_failed", "start_again", "task")  # keys that make no other run


@dataclass(frozen=True)
class Original:
    """The run that a command repeats with a change."""

    named: str  # as it was typed
    config: Any
    folder: Path

    def line(self, job: JobSpec) -> str:
        """Return 'like runs/x/3 (run ID ab12): epochs: 100 -> 200' about the run that is made of it."""
        old, new = identity(self.config), identity(job.train)
        changed = "; ".join(differences(old, new)) or "the same run, alone"
        return f"like {self.named} (run ID {signature(self.config)}): {changed}; run ID {signature(job.train)}"


def overrides_of(config: Any, given: Sequence[str] = ()) -> list[str]:
    """Return the overrides that make `config` alone: those of `given`, as far as they are known, and what they lack.

    Raise ValueError if no overrides make it.
    """
    task = task_of(config)
    own = {f.name for f in fields(task.Config)}
    of_job = {*_OF_A_JOB, *({f.name for f in fields(ClusterProfile)} - own)}
    words = [word for word in given if re.split(r"[.=]", word)[0] not in of_job]
    if not given:
        words = [f"{group}={name}" for group, name in _presets(task, to_dict(config))]
    words = _completed(config, task, words)
    if rest := differences(_compared(config, task), _compared(_composed(words, task), task)):
        raise ValueError(f"a run that is repeated must be made by overrides; got one of which {rest[0]}")
    return words


def _composed(words: Sequence[str], task: Task) -> Any:
    return compose_job(words, task.name, validated=False).train


def _presets(task: Task, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield group and preset for each group whose preset the values name."""
    for group, presets in task.groups().items():
        held = values.get(group)
        name = held.get("name") if isinstance(held, Mapping) else held
        if name in presets:
            yield group, str(name)


def _compared(config: Any, task: Task) -> dict[str, Any]:
    """Return what identifies `config`, without the fingerprint of its data, which is computed."""
    values = identity(config)
    if "fingerprint" in task.KEYS:
        *path, last = task.KEYS["fingerprint"].split(".")
        (lookup(values, ".".join(path)) if path else values).pop(last, None)
    return values


def _completed(config: Any, task: Task, words: Sequence[str]) -> list[str]:
    """Return `words`, and an override for each key in which they do not make `config` yet."""
    made, whole = _composed(words, task), dict(leaves(to_dict(config)))
    wanted, found = dict(leaves(_compared(config, task))), dict(leaves(_compared(made, task)))
    keys = [key for key in wanted | found if key in whole and whole[key] != found.get(key)]
    root = task.KEYS.get("data_root")
    if root and whole[root] and whole[root] != lookup(to_dict(made), root):
        keys.append(root)  # as a profile has it
    if (source := task.KEYS.get("weights")) and whole[source]:  # its digest alone is in the identity
        keys += [source, f"{source}_keys"]
    return [*words, *(f"{key}={text(whole[key])}" for key in dict.fromkeys(keys))]


def text(value: Any) -> str:
    """Return a value as a command line takes it."""
    if isinstance(value, list):
        return f"[{','.join(map(text, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def expanded(arguments: Sequence[str]) -> tuple[list[str], Original | None]:
    """Return `arguments` with the overrides of the run that --like or --weights-from names in its place, and that run.

    What the other arguments set anew is left out of them. Raise ValueError if there is no such run.
    """
    like, words = _taken("--like", list(arguments))
    start, words = _taken("--weights-from", words)
    if like and start:
        raise ValueError(f"--weights-from must be given without --like, whose configuration it takes too; got --like {like}")
    if not (named := like or start):
        return words, None
    config, given, folder = _original(named, "--like" if like else "--weights-from")
    base = [word for word in overrides_of(config, given) if not any(_replaces(own, word) for own in words)]
    if start:
        key = task_of(config).KEYS.get("weights")
        if key is None:
            raise ValueError(f"--weights-from must name a run whose task can start from weights; got {start}")
        base = [*(word for word in base if not word.startswith(key)), f"{key}={text(str(folder))}"]
    if (task := task_name(config)) != DEFAULT_TASK:
        base = [f"task={task}", *base]
    # Beside the other overrides, of which none sets what these do: options may stand before or after them.
    end = max((i + 1 for i, word in enumerate(words) if "=" in word and not word.startswith("-")), default=len(words))
    return [*words[:end], *base, *words[end:]], Original(named, config, folder)


def _replaces(own: str, word: str) -> bool:
    """Return whether the override `own` sets what `word` does, or a group that it belongs to."""
    key, known = own.partition("=")[0].lstrip("+~"), word.partition("=")[0]
    return "=" in own and (known == key or known.startswith(f"{key}.") or key.startswith(f"{known}."))


def _taken(option: str, words: list[str]) -> tuple[str, list[str]]:
    """Return what stands behind `option`, "" without it, and the other words."""
    for i, word in enumerate(words):
        if word == option and i + 1 < len(words):
            return words[i + 1], [*words[:i], *words[i + 2 :]]
        if word.startswith(f"{option}="):
            return word.partition("=")[2], [*words[:i], *words[i + 1 :]]
    return "", words


def _original(named: str, option: str) -> tuple[Any, list[str], Path]:
    """Return configuration, overrides as far as they were recorded, and folder of the run that is meant."""
    folder = run_folder(Path(named), option)
    sweep = folder.parent.parent if folder.parent.name == "trials" else None
    if sweep is not None and (sweep / "sweep.json").exists():
        program.use(sweep)
        known = recorded(sweep, folder.name)
    else:
        known = None
    if (folder / "config.yaml").exists():
        return RunFolder(folder).config(), known.overrides if known else [], folder
    if known is None or known.values is None:
        raise ValueError(f"{option} must be SWEEP_FOLDER/TRIAL, or a run folder with config.yaml; got {named}")
    return from_dict(known.values), known.overrides, folder
