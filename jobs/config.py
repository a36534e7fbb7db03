"""Compose overrides such as `data=digits optimizer.lr=0.003` into a JobSpec through Hydra."""

import copy
import difflib
import functools
import hashlib
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import field, fields, is_dataclass, make_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString, ValueType
from hydra.errors import HydraException
from omegaconf import DictConfig, EnumNode, OmegaConf, ValueNode
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, InterpolationKeyError, OmegaConfBaseException, ValidationError

from cnnjepa.run.command_line import did_you_mean
from cnnjepa.run.identity import DEFAULT_TASK, from_dict, lookup, put, signature
from jobs.cli import require_printable, resolved
from jobs.cluster import RENAMED, ClusterProfile, JobSpec, fit_to, validate_cluster
from jobs.profiles import CONFIG_DIR as CONFIG_DIR
from jobs.profiles import find, names, shipped
from jobs.task import Task, task_named

CONFIG_NAME = "job"


@functools.cache
def _job_schema(task: Task) -> type:
    """Return a dataclass of the task's keys and those of a job, as a schema for Hydra."""
    defaults = [*task.DEFAULTS, {"cluster": "local"}]
    own: list[Any] = [
        ("cluster", ClusterProfile, field(default_factory=lambda: ClusterProfile("local"))),
        ("run_dir", str, ""),
        ("retry_failed", bool, False),  # run a failed run again, from its last checkpoint
        ("start_again", bool, False),  # where the user's images have changed since a run began: jobs/planned.py
        ("defaults", list[Any], field(default_factory=lambda: defaults)),
    ]
    return make_dataclass("_Job", own, bases=(task.Config,))


def cluster_names() -> list[str]:
    """Return the names of the cluster profiles: the files of slurm/cluster, and those of the user and of other packages."""
    return names(CONFIG_DIR)


PROFILES = f"{', '.join(shipped())}, a file of ./slurm/cluster, or the path of a .yaml file"
_own: dict[str, Path] = {}  # name in Hydra's store -> the profile's file that was read


def _is_path(profile: str) -> bool:
    return "/" in profile or profile.endswith((".yaml", ".yml"))


def absolute(profile: str) -> str:
    """Return a cluster profile, its name or the path of its file, so that it can be given in any folder."""
    if _is_path(profile):
        return str(Path(profile).expanduser().absolute())
    return str(find(profile, CONFIG_DIR) or profile)


def _stored(profile: str) -> str:
    """Return the name under which Hydra finds a profile; read its file if it is given by a path."""
    given = absolute(profile)
    if not _is_path(given):
        return profile
    path = Path(given)
    try:
        now = path.stat()
        return _read_profile(path, now.st_mtime_ns, now.st_size)
    except FileNotFoundError as error:
        raise ValueError(f"cluster must be a name, or the path of a file; got {profile}: there is no such file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be YAML; got {' '.join(str(error).split())}") from error
    except (OSError, OmegaConfBaseException) as error:
        raise ValueError(f"{path} must be a file of keys and values; got {' '.join(str(error).split())}") from error


@functools.lru_cache(16)  # a sweep composes every trial
def _read_profile(path: Path, _changed: int, _size: int) -> str:
    found = OmegaConf.load(path)
    if not isinstance(found, DictConfig):
        raise ValueError(f"{path} must be a file of keys and values; got a list")
    name = f"own-{hashlib.sha256(str(path).encode() + path.read_bytes()).hexdigest()[:12]}"
    ConfigStore.instance().store(group="cluster", name=name, node=found)
    _own[name] = path
    return name


def _file_of(name: str) -> Path:
    """Return the path of a profile's file, for messages."""
    return _own.get(name, Path("slurm") / "cluster" / f"{name}.yaml")


@functools.lru_cache(1)  # two tasks may have groups of the same name
def register_schemas(task: Task) -> None:
    """Register the task's schema and presets with Hydra."""
    store = ConfigStore.instance()
    store.store(name=CONFIG_NAME, node=_job_schema(task))
    for group, presets in task.groups().items():
        for name, preset in presets.items():
            store.store(group=group, name=name, node=preset)


def _groups(task: Task) -> dict[str, list[str]]:
    return {**{group: sorted(presets) for group, presets in task.groups().items()}, "cluster": cluster_names()}


def qualified(overrides: Sequence[str], task: str = DEFAULT_TASK) -> list[str]:
    """Return `overrides` with the profile's keys in full, account=x as cluster.account=x, and its path as a name for Hydra."""
    own = {"task", *(f.name for f in fields(_job_schema(task_named(task))))}
    short = {f.name for f in fields(ClusterProfile)} - own
    full = [f"cluster.{o}" if re.split(r"[.=]", o)[0] in short else o for o in overrides]
    return [f"cluster={_stored(o.removeprefix('cluster='))}" if o.startswith("cluster=") else o for o in full]


def override_keys(name: str = DEFAULT_TASK) -> list[str]:
    """Return the keys that a command takes: groups, short profile keys, and all full keys."""
    task = task_named(name)
    own = {f.name for f in fields(_job_schema(task))}
    return [*_groups(task), *(f.name for f in fields(ClusterProfile) if f.name not in own), *_leaves(_compose([], task))]


_ASSIGNMENT = re.compile(r"[\w./@][\w./@-]*=")
_QUOTED = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
_PART = re.compile(rf"(\s*(?:{_QUOTED})\s*|(?:\\.|\$\{{[^}}]*\}}|[^,])*),")  # what a comma ends
_TEXTS = "a list of texts"
_ESCAPE = re.compile(r"\\[\\()\[\]{}:=, \t]")  # what Hydra would read as the second character alone


def as_typed(override: str, task: Task, several: bool = False) -> str:
    """Return `override` in Hydra's grammar, where a text means what was typed, whatever its characters.

    A text is the value of a key of type `str` or `list[str]`, and of an sbatch option unless it is
    true, false or null. What is in quotes stays. With `several`, commas separate values, as
    --multirun has it, but of an sbatch option. Raise ValueError at an escape outside quotes.
    """
    key, _, value = override.partition("=")
    kind = _type_of(key, task) if _ASSIGNMENT.match(override) else None
    several = several and kind is not Any
    read = _read(override) if several else None
    swept = read.value_type if read and read.is_sweep_override() else None
    if kind is _TEXTS and value.startswith("[") and value.endswith("]") and not swept:
        return f"{key}=[{','.join(_text(key, part.strip(), str) for part in _PART.findall(value[1:-1] + ','))}]"
    if kind not in (str, Any) or swept not in (None, ValueType.SIMPLE_CHOICE_SWEEP):  # choice(a,b) and the like
        return override
    parts = [part.strip() for part in _PART.findall(value + ",")] if several else [value]
    return f"{key}={','.join(_text(key, part, kind) for part in parts)}"


def _text(key: str, value: str, kind: Any) -> str:
    """Return one value of a key in Hydra's quotes, unless it has quotes or, of `Any` type, is true, false or null."""
    if not value or re.fullmatch(_QUOTED, value) or (kind is Any and value.lower() in ("true", "false", "null")):
        return value
    if _ESCAPE.search(value):
        rule = "be in quotes where a backslash stands before one of \\()[]{}:=, or a blank, which could be an escape"
        shown = shlex.quote(f"{key}={QuotedString(value, Quote.double).with_quotes()}")
        raise ValueError(f"{key} must {rule}; got {value}: leave the backslash out, or, if it belongs to the value, write {shown}")
    return QuotedString(value, Quote.single).with_quotes()


def _read(override: str) -> Override | None:
    """Return what Hydra reads, or None where it can read nothing."""
    with suppress(HydraException, RecursionError):
        return _parsed(override)
    return None


@functools.lru_cache(1024)
def _type_of(key: str, task: Task) -> Any:
    """Return the type of a key in the schema or in a preset of its group; None if it is unknown."""
    group, _, rest = key.partition(".")
    presets = task.groups().get(group, {}).values() if rest else ()
    found = [_field_type(_job_schema(task), key)]
    found += [_field_type(preset if isinstance(preset, type) else type(preset), rest) for preset in presets]
    return next((kind for kind in found if kind is not None), None)


def _field_type(kind: Any, key: str) -> Any:
    for name in key.split("."):
        of_dict = get_args(kind) if get_origin(kind) is dict else None
        kind = of_dict[1] if of_dict else get_type_hints(kind).get(name) if is_dataclass(kind) else None
    return _TEXTS if get_origin(kind) is list and get_args(kind) == (str,) else kind


def _check_form(overrides: Sequence[str]) -> None:
    for override in overrides:
        require_printable(override, "an override")
        if not _ASSIGNMENT.match(override):
            raise ValueError(f"an override must have the form key=value; got {override}")


def _readable(overrides: Sequence[str], task: Task, several: bool = False) -> list[str]:
    """Return `as_typed` of each; raise ValueError at one that Hydra cannot read."""
    _check_form(overrides)
    typed = [as_typed(override, task, several) for override in overrides]
    if unread := [o for o, t in zip(overrides, typed) if _read(t) is None]:
        rule = "have a value that Hydra can read"
        raise ValueError(f"an override must {rule}; got {unread[0]}: put text in quotes, as in 'key=\"a (b)\"'")
    return typed


@functools.lru_cache(1024)
def _parsed(override: str) -> Override:
    return OverridesParser.create().parse_override(override)


def _check_choices(overrides: Sequence[str], task: Task) -> None:
    choices = _groups(task)
    for override in overrides:
        key, _, value = override.partition("=")
        if new := RENAMED.get(key.removeprefix("cluster.")):
            old = key.removeprefix("cluster.")
            raise ValueError(f"{old} must be written {new}; got {override}: write {override.replace(old, new, 1)}")
        if new := task.RENAMED.get(key):
            raise ValueError(f"{key} must be written {new}; got {override}: write {new}={value}")
        options = choices.get(key)
        if options is not None and value not in options and not (key == "cluster" and value in _own):
            further = f": give a profile of your own by its path, such as ./{value}.yaml" if key == "cluster" else ""
            raise ValueError(f"{key} must be one of {', '.join(options)}; got {value}{further}")
        if key == task.KEYS.get("threads"):
            raise ValueError(f"{key} must be left to cluster.cores_per_trial; got {override}")
        if key == task.KEYS.get("fingerprint"):
            raise ValueError(f"{key} must be left out, since it is computed from the images; got {override}")


def _leaves(node: Any, path: str = "") -> list[str]:
    if not isinstance(node, DictConfig):
        return [path]
    inner = [f"{path}.{k}" if path else str(k) for k in map(str, node)]
    return [leaf for key, child in zip(inner, node.values(), strict=True) for leaf in _leaves(child, key)]


def _explain(error: Exception, overrides: Sequence[str], task: Task) -> str:
    """Explain an error of Hydra or OmegaConf in one line with key, rule and value."""
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__ or error.__context__ or error
    key, node = getattr(cause, "full_key", None) or "", getattr(cause, "child_node", None)
    override = next((o for o in reversed(overrides) if o.startswith((f"{key}=", f"{key}."))), "")  # the last one counts
    given = override.partition("=")[2]
    if isinstance(cause, (ConfigKeyError, ConfigAttributeError)) and not isinstance(cause, InterpolationKeyError):
        if not override and cause.object_type is ClusterProfile:
            # The unknown key is in the profile's file, not in an override.
            given = _profile(overrides)
            hint = did_you_mean(str(cause.key), [f.name for f in fields(ClusterProfile)])
            if new := RENAMED.get(str(cause.key)):
                hint = f": write {new}, and likewise for every key that ends in _per_slot"
            return f"{_file_of(given)} must hold keys of ClusterProfile (jobs/cluster.py); got {cause.key}{hint}"
        choices = _groups(task)
        known = _leaves(_compose([o for o in overrides if o.partition("=")[0] in choices], task))
        near = difflib.get_close_matches(key, known, 1) or [k for k in known if k.split(".")[-1] == key.split(".")[-1]][:1]
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"{key} must be a key of the configuration; got {override or key}{hint}"
    if isinstance(node, EnumNode):
        return f"{key} must be one of {', '.join(node.enum_type.__members__)}; got {given}"
    if isinstance(node, ValueNode) and isinstance(cause, ValidationError):
        return f"{key} must be of type {type(node).__name__.removesuffix('Node').lower()}; got {given}"
    first = str(cause).strip().splitlines()[0].strip()
    hint = r": write \${ where ${ belongs to the value" if "${" in given else ""
    return f"{key or 'an override'} must fit the configuration; got {given or ' '.join(overrides)}: {first}{hint}"


def _compose(overrides: Sequence[str], task: Task) -> DictConfig:
    """Compose the groups with Hydra, once per process and choice, and then set the other keys."""
    groups = _groups(task)
    choices = tuple(o for o in overrides if o.partition("=")[0] in groups or re.match(r"[\w.]*[/@]", o))
    # Any sbatch option may be added.
    keys = [_parsed(f"++{o}" if o.startswith("cluster.sbatch.") else o) for o in overrides if o not in choices]
    profile = CONFIG_DIR / "cluster" / f"{_profile(overrides)}.yaml"
    changed = profile.stat().st_mtime_ns if profile.exists() else 0
    config = copy.deepcopy(_chosen(choices, task, changed))
    ConfigLoaderImpl._apply_overrides_to_config(keys, config)  # what Hydra itself does next
    return config


@functools.lru_cache(64)
def _chosen(choices: tuple[str, ...], task: Task, _changed: int) -> DictConfig:
    register_schemas(task)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return compose(CONFIG_NAME, list(choices))


def _last(overrides: Sequence[str], key: str) -> str:
    """Return the value of the last override of `key`, or "" if there is none."""
    return next((o.partition("=")[2] for o in reversed(overrides) if o.startswith(f"{key}=")), "")


def _profile(overrides: Sequence[str]) -> str:
    """Return the name of the cluster profile."""
    return _last(overrides, "cluster") or "local"


def job_from(config: DictConfig, task: Task, overrides: Sequence[str] = ()) -> JobSpec:
    """Build the JobSpec of a composed configuration; raise ValueError if its profile is invalid."""
    for key in config.cluster.required:
        if not config.cluster.get(key):
            raise ValueError(f"cluster.{key} must be given for cluster {config.cluster.name}; got none: add {key}=VALUE")
    try:
        plain = OmegaConf.to_container(config, resolve=True, enum_to_str=True, throw_on_missing=True)
        assert isinstance(plain, dict)
        values = {str(k): v for k, v in plain.items()}
        cluster = OmegaConf.to_object(config.cluster)
    except OmegaConfBaseException as error:
        raise ValueError(_explain(error, overrides, task)) from error
    assert isinstance(cluster, ClusterProfile)
    # The shell expands no ~ after key=.
    for key in ("run_dir", *([task.KEYS["data_root"]] if "data_root" in task.KEYS else [])):
        put(values, key, os.path.expanduser(lookup(values, key)))
    for key in ("runs_dir", "data_root", "local_scratch"):
        setattr(cluster, key, os.path.expanduser(getattr(cluster, key)))
    validate_cluster(cluster)
    names = {f.name for f in fields(task.Config)}
    train = from_dict({k: v for k, v in values.items() if k in names})
    fit_to(cluster, train)
    run_dir = resolved(Path(values["run_dir"]), "run_dir") if values["run_dir"] else default_run_dir(cluster, train)
    return JobSpec(train, cluster, run_dir, *(bool(values[key]) for key in ("retry_failed", "start_again")))


def default_run_dir(cluster: ClusterProfile, train: Any) -> Path:
    """Return the run folder of a single run that names none."""
    return resolved(Path(cluster.runs_dir) / "single" / signature(train), "run_dir")


def split_multirun(overrides: Sequence[str]) -> list[list[str]]:
    """Return the overrides of each job of a multirun: two for `optimizer.lr=0.003,0.01`."""
    parsed = [_parsed(o) for o in _readable(overrides, task_named(DEFAULT_TASK), several=True)]
    return [list(job) for batch in BasicSweeper.split_arguments(parsed, max_batch_size=None) for job in batch]


@contextmanager
def comma_explained(overrides: Sequence[str]) -> Iterator[None]:
    """Add to an error about a text that --multirun has split how to write one that holds a comma."""
    try:
        yield
    except ValueError as error:
        task = task_named(DEFAULT_TASK)
        for override in overrides:
            key, _, value = override.partition("=")
            if str(error).startswith(f"{key} must") and as_typed(override, task) != as_typed(override, task, several=True):
                shown = shlex.quote(f"{key}={QuotedString(value, Quote.double).with_quotes()}")
                raise ValueError(f"{error}; with --multirun a comma separates values: for one that holds a comma write {shown}") from error
        raise


def compose_job(overrides: Sequence[str], name: str = DEFAULT_TASK, trains: bool = True, validated: bool = True) -> JobSpec:
    """Compose and validate one job; raise ValueError, one line with key, rule and value.

    Without `trains`, its batch need not be one that the profile's ranks can share. Without
    `validated`, nothing is checked that other ranks could change.
    """
    name = _last(overrides, "task") or name
    task = task_named(name)
    overrides = qualified([o for o in overrides if not o.startswith("task=")], name)
    read = _readable(overrides, task)
    _check_choices(overrides, task)
    profile = _profile(overrides)
    try:
        job = job_from(_compose(read, task), task, overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_explain(error, overrides, task)) from error
    except yaml.YAMLError as error:
        raise ValueError(f"{_file_of(profile)} must be YAML; got {' '.join(str(error).split())}") from error
    except OSError as error:
        raise ValueError(f"{_file_of(profile)} must be a file of keys and values; got {error}") from error
    except (TypeError, KeyError, AttributeError, ValueError, OverflowError) as error:
        if isinstance(error, ValueError) and " must " in str(error):
            raise
        said = f"{type(error).__name__} {' '.join(str(error).split())}"
        raise ValueError(f"overrides must fit the configuration; got {' '.join(overrides)}: {said}") from error
    if job.cluster.name != _file_of(profile).stem:
        raise ValueError(f"{_file_of(profile)} must hold name: {_file_of(profile).stem}; got {job.cluster.name!r}")
    if validated:
        task.validate(job.train, job.cluster.ranks_per_trial if trains else 1)
    return job
