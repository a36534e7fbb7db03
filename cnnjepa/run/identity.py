"""Identify runs: configurations as plain values, and the run ID that follows from them."""

import copy
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import json
import operator
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from typing import Any, TypeVar

from cnnjepa.run.typed import checked

DEFAULT_TASK = "cnnjepa.task"
FIDELITY = ("epochs", "steps")  # keys of a configuration that say how long it trains; the first that it has counts


def task_name(config: Any) -> str:
    """Return the module that trains `config`, an object or plain values."""
    named = config.get("task") if isinstance(config, Mapping) else getattr(config, "task", None)
    return str(named or DEFAULT_TASK)


_files: dict[str, str] = {}  # module of a program -> its file, if it is not to be looked for on the path
_held: dict[str, Any] = {}  # task -> what a running script itself holds under that name


def load_from(module: str, file: str) -> None:
    """Take `module` from `file` from now on, and not from the path. One that is imported already stays."""
    _files[module] = file


def is_placed(module: str) -> bool:
    """Return whether this process knows already from which file it takes `module`."""
    return module in _files


def forget(module: str) -> None:
    """Look for `module` on the path again, and import it again at its next use."""
    _files.pop(module, None)
    sys.modules.pop(module, None)
    task_module.cache_clear()


def file_of(module: str) -> str:
    """Return the file of a module that is or could be imported."""
    return _files.get(module) or str(_imported(module).__file__)


def hold(name: str, task: Any) -> None:
    """Take `task` for the task called `name` in this process: the running script must not be imported once more."""
    _held[name] = task


def _imported(name: str) -> types.ModuleType:
    file = _files.get(name)
    if file is None or name in sys.modules:
        return importlib.import_module(name)
    if (above := file.removesuffix(".py").removesuffix(name.replace(".", "/"))) not in sys.path:
        sys.path.insert(0, above)
    spec = importlib.util.spec_from_file_location(name, file)
    if "." in name or spec is None or spec.loader is None:
        return importlib.import_module(name)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@functools.cache
def task_module(name: str) -> Any:
    """Import a task, a module or `module:NAME` for what a module holds; raise ValueError if it fails or lacks what a task needs."""
    module, _, inner = name.partition(":")
    try:
        found: Any = _held[name] if name in _held else _imported(module)
    except Exception as error:  # an import may raise anything
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"task must be a module that can be imported; got {module}: {said}: add its folder to PYTHONPATH") from error
    file = getattr(found, "__file__", module)
    if inner and name not in _held:
        if not hasattr(found, inner):
            raise ValueError(f"task must be a name in its module; got {inner}, which {file} does not hold")
        found = getattr(found, inner)
    found = getattr(found, "own_task", found)
    kind = getattr(found, "Config", None)
    keys = {f.name for f in dataclasses.fields(kind)} if isinstance(kind, type) and dataclasses.is_dataclass(kind) else set()
    parts = {
        "a dataclass Config": bool(keys),
        "Config.seed": "seed" in keys,
        "Config.epochs": bool(keys & set(FIDELITY)),
        "a function train": callable(getattr(found, "train", None)),
    }
    if lacking := [part for part, is_there in parts.items() if not is_there]:
        raise ValueError(f"task must be a module with {', '.join(parts)}; got {name} ({file}) without {lacking[0]}")
    return found


@functools.cache
def config_class(name: str) -> type:
    """Return a task's Config, which records the module under `task` unless it is the default."""
    kind: type = task_module(name).Config
    if name == DEFAULT_TASK:
        return kind
    recorded = [("task", str, dataclasses.field(default=name))]
    # Pickled by value: no module holds the class.
    namespace = {"__reduce__": lambda config: (from_dict, (to_dict(config),)), "__doc__": kind.__doc__}
    return dataclasses.make_dataclass(kind.__name__, recorded, bases=(kind,), namespace=namespace)


def _default(f: "dataclasses.Field[Any]") -> Any:
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


def to_dict(config: Any, neutral: bool = True) -> dict[str, Any]:
    """Return `config` as nested dicts of JSON values, enums by name.

    With `neutral=False`, omit neutral fields, and fields marked `added` that hold their default.
    """
    out: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        is_neutral = f.metadata.get("neutral")
        if callable(is_neutral):  # it depends on the configuration
            is_neutral = is_neutral(config)
        if not neutral and (is_neutral or (f.metadata.get("added") and value == _default(f))):
            continue
        if dataclasses.is_dataclass(value):
            value = to_dict(value, neutral)
        out[f.name] = value.name if isinstance(value, Enum) else value
    return out


T = TypeVar("T")


def _build(kind: Callable[..., T], values: dict[str, Any], path: str) -> T:
    assert isinstance(kind, type)
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ValueError(f"{path}{unknown[0]} must be a key of {kind.__name__}; got a file of another version of this project")
    built: dict[str, Any] = {}
    for name, value in values.items():
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            kind_of = getattr(hint, "kind_of", None)  # the values choose the class
            built[name] = _build(typing.cast(Callable[..., Any], kind_of(value) if kind_of else hint), value, f"{path}{name}.")
        else:
            built[name] = checked(hint, value, f"{path}{name}")
    return typing.cast(T, kind(**built))


def old_keys(values: Mapping[str, Any]) -> dict[str, str]:
    """Return the keys of `values` that the task has renamed since, with their new names."""

    def has(key: str) -> bool:
        try:
            lookup(values, key)
        except ValueError:
            return False
        return True

    renamed: Mapping[str, str] = getattr(task_module(task_name(values)), "RENAMED", {})
    return {old: new for old, new in renamed.items() if has(old)}


def _renamed(values: dict[str, Any]) -> dict[str, Any]:
    if not (found := old_keys(values)):
        return values
    values = copy.deepcopy(values)
    for old, new in found.items():
        *path, last = old.split(".")
        value = functools.reduce(operator.getitem, path, values).pop(last)
        put(values, new, value)
    return values


def from_dict(values: dict[str, Any]) -> Any:
    """Build what `to_dict` wrote, also under old names of keys.

    Raise ValueError at unknown keys, TypeError for no dictionary.
    """
    if not isinstance(values, dict):
        raise TypeError(f"a configuration must be a dictionary; got a {type(values).__name__}")
    return _build(config_class(task_name(values)), _renamed(values), "")


def identity(config: Any) -> dict[str, Any]:
    """Return `config` without its neutral keys: what tells one run from another."""
    return to_dict(config, neutral=False)


def fidelity(values: Mapping[str, Any]) -> str:
    """Return the key that says how long a run of plain `values` trains: epochs or steps."""
    return next((key for key in FIDELITY if key in values), FIDELITY[0])


def length(values: Mapping[str, Any]) -> int:
    """Return for how many epochs or steps a run of plain `values` trains."""
    return int(values[fidelity(values)])


def lookup(values: Mapping[str, Any], key: str) -> Any:
    """Return the value at a dotted key of nested dicts; raise ValueError if it is missing."""
    value: Any = values
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            raise ValueError(f"the configuration must have {key}; got one without it: the key may belong to another method")
        value = value[part]
    return value


def leaves(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield full key and value of each hyperparameter of plain values."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{path}{key}.")
        elif path or key != "task":
            yield f"{path}{key}", value


def put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set the value at a dotted key of nested dicts; the dicts on its way must be there."""
    *path, last = key.split(".")
    functools.reduce(operator.getitem, path, values)[last] = value


def signature(config: Any) -> str:
    """Return the run ID: 16 hex digits, the same for configurations of the same run."""
    text = json.dumps(identity(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(old: dict[str, Any], new: dict[str, Any], path: str = "") -> list[str]:
    """Return a line 'key: old -> new' for each leaf in which two `to_dict` results differ."""
    lines: list[str] = []
    for key in sorted(set(old) | set(new)):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{path}{key}.")
        elif a != b:
            lines.append(f"{path}{key}: {a} -> {b}")
    return lines
