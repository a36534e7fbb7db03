"""The only reader of Hydra and YAML: overrides such as `data=digits optimizer.lr=0.003` become a JobSpec, or one clear ValueError."""

import difflib
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cnnjepa.config import DATA_PRESETS, TrainConfig, method_module, method_names, optimizer_presets
from cnnjepa.rules import validate
from cnnjepa.run.command_line import did_you_mean
from cnnjepa.run.identity import from_dict, signature
from jobs.cli import require_printable, resolved
from jobs.cluster import ClusterProfile, JobSpec, fit_to, validate_cluster

CONFIG_DIR = Path(__file__).resolve().parent.parent / "slurm"
CONFIG_NAME = "job"
# A method brings its own optimiser unless another is asked for.
_DEFAULTS = ["_self_", {"method": "cnn_jepa"}, {"optimizer": "${method}"}, {"data": "digits"}, {"cluster": "local"}]


@dataclass
class _Job(TrainConfig):
    """TrainConfig's keys, and what Hydra's command line needs beside them."""

    cluster: ClusterProfile = field(default_factory=lambda: ClusterProfile("local"))
    run_dir: str = ""
    retry_failed: bool = False  # run a failed run again, from its last checkpoint
    defaults: list[Any] = field(default_factory=lambda: list(_DEFAULTS))


def cluster_names() -> list[str]:
    """The cluster profiles: the files of slurm/cluster."""
    return sorted(p.stem for p in (CONFIG_DIR / "cluster").glob("*.yaml"))


@functools.cache
def register_schemas() -> None:
    """Make the schema and the groups `method`, `optimizer` and `data` known to Hydra."""
    store = ConfigStore.instance()
    store.store(name=CONFIG_NAME, node=_Job)
    for name in method_names():
        store.store(group="method", name=name, node=method_module(name).Config)
    for name, optimizer in optimizer_presets().items():
        store.store(group="optimizer", name=name, node=optimizer)
    for name, preset in DATA_PRESETS.items():
        store.store(group="data", name=name, node=preset)


def _groups() -> dict[str, list[str]]:
    return {"method": method_names(), "optimizer": sorted(optimizer_presets()), "data": sorted(DATA_PRESETS), "cluster": cluster_names()}


def qualified(overrides: Sequence[str]) -> list[str]:
    """`overrides` with the profile's keys in full: account=x for short is cluster.account=x."""
    own = {f.name for f in fields(_Job)}
    short = {f.name for f in fields(ClusterProfile)} - own
    return [f"cluster.{o}" if re.split(r"[.=]", o)[0] in short else o for o in overrides]


def override_keys() -> list[str]:
    """Return the keys that a command takes as key=value: groups, the profile's keys in short, and all keys in full."""
    own = {f.name for f in fields(_Job)}
    return [*_groups(), *(f.name for f in fields(ClusterProfile) if f.name not in own), *_leaves(_compose([]))]


def _check_syntax(overrides: Sequence[str]) -> None:
    parser = OverridesParser.create()
    for override in overrides:
        require_printable(override, "an override")
        if not re.match(r"[\w./@]+=", override):
            raise ValueError(f"an override must have the form key=value; got {override}")
        try:
            parser.parse_override(override)
        except (HydraException, RecursionError) as error:
            raise ValueError(f"an override must have a value that Hydra can read; got {override}") from error


def _check_choices(overrides: Sequence[str]) -> None:
    for override in overrides:
        key, _, value = override.partition("=")
        options = _groups().get(key)
        if options is not None and value not in options:
            raise ValueError(f"{key} must be one of {', '.join(options)}; got {value}")
        if key == "threads":
            raise ValueError(f"threads must be left to cluster.cores_per_slot; got {override}")


def _leaves(node: Any, path: str = "") -> list[str]:
    if not isinstance(node, DictConfig):
        return [path]
    inner = [f"{path}.{k}" if path else str(k) for k in map(str, node)]
    return [leaf for key, child in zip(inner, node.values(), strict=True) for leaf in _leaves(child, key)]


def _explain(error: Exception, overrides: Sequence[str]) -> str:
    """One line with the key, the rule and the value for what Hydra or OmegaConf says in several."""
    cause = error.__cause__ or error
    text = str(cause)
    named = re.search(r"full_key: (\S+)", text) or re.search(r"Could not override '([^']+)'", str(error))
    key = named[1] if named else ""
    override = next((o for o in reversed(overrides) if o.startswith((f"{key}=", f"{key}."))), "")  # the last one counts
    given = override.partition("=")[2]
    unknown = re.search(r"Key '([^']+)' not in 'ClusterProfile'", text)
    if unknown and not override:
        # Said of the profile's file, which no override names.
        given = next((o.partition("=")[2] for o in overrides if o.startswith("cluster=")), "local")
        hint = did_you_mean(unknown[1], [f.name for f in fields(ClusterProfile)])
        return f"slurm/cluster/{given}.yaml must hold keys of ClusterProfile (jobs/cluster.py); got {unknown[1]}{hint}"
    if "not in struct" in text or "Could not override" in str(error):
        with_defaults = [o for o in overrides if o.partition("=")[0] in ("method", "optimizer", "data", "cluster")]
        known = _leaves(_compose(with_defaults))
        near = difflib.get_close_matches(key, known, 1) or [k for k in known if k.split(".")[-1] == key.split(".")[-1]][:1]
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"{key} must be a key of the configuration; got {override or key}{hint}"
    expected = re.search(r"expected one of \[([^\]]*)\]", text)
    if expected:
        return f"{key} must be one of {expected[1]}; got {given}"
    wrong = re.search(r"could not be converted to (\w+)", text) or re.search(r"Cannot convert '[^']*' to (?:type )?'?(\w+)", text)
    if wrong:
        return f"{key} must be of type {wrong[1].lower()}; got {given}"
    first = text.strip().splitlines()[0]
    return f"{key or 'an override'} must fit the configuration; got {given or ' '.join(overrides)}: {first.strip()}"


def _compose(overrides: Sequence[str]) -> DictConfig:
    register_schemas()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        # The profile's sbatch options are open: any may be added.
        return compose(CONFIG_NAME, [f"++{o}" if o.startswith("cluster.sbatch.") else o for o in overrides])


def job_from(config: DictConfig) -> JobSpec:
    """The JobSpec of a composed configuration; raises ValueError where a profile or a value breaks a rule."""
    for key in config.cluster.required:
        if not config.cluster.get(key):
            raise ValueError(f"cluster.{key} must be given for cluster {config.cluster.name}; got none: add {key}=VALUE")
    try:
        values = OmegaConf.to_container(config, resolve=True, enum_to_str=True, throw_on_missing=True)
        assert isinstance(values, dict)
        cluster = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ClusterProfile), values["cluster"]))
    except OmegaConfBaseException as error:
        raise ValueError(_explain(error, [])) from error
    assert isinstance(cluster, ClusterProfile)
    validate_cluster(cluster)
    names = {f.name for f in fields(TrainConfig)}
    train = from_dict({str(k): v for k, v in values.items() if k in names})
    fit_to(cluster, train)
    run_dir = values["run_dir"] or str(Path(cluster.runs_dir) / "single" / signature(train))
    return JobSpec(train, cluster, resolved(Path(run_dir), "run_dir"), bool(values["retry_failed"]))


def split_multirun(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of each job of a Hydra multirun, such as two jobs for `optimizer.lr=0.003,0.01`."""
    _check_syntax(overrides)
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return [list(job) for batch in BasicSweeper.split_arguments(parsed, max_batch_size=None) for job in batch]


def compose_job(overrides: Sequence[str]) -> JobSpec:
    """A JobSpec that can run on its profile's ranks; raises ValueError, one line with key, rule and value, where it cannot."""
    overrides = qualified(overrides)
    _check_syntax(overrides)
    _check_choices(overrides)
    profile = next((o.partition("=")[2] for o in reversed(overrides) if o.startswith("cluster=")), "local")
    try:
        job = job_from(_compose(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_explain(error, overrides)) from error
    except yaml.YAMLError as error:
        raise ValueError(f"slurm/cluster/{profile}.yaml must be YAML; got {' '.join(str(error).split())}") from error
    except OSError as error:
        raise ValueError(f"slurm/cluster/{profile}.yaml must be a file of keys and values; got {error}") from error
    except (TypeError, KeyError, AttributeError, ValueError, OverflowError) as error:
        if isinstance(error, ValueError) and " must " in str(error):
            raise
        said = f"{type(error).__name__} {' '.join(str(error).split())}"
        raise ValueError(f"overrides must fit the configuration; got {' '.join(overrides)}: {said}") from error
    if job.cluster.name != profile:
        raise ValueError(f"slurm/cluster/{profile}.yaml must hold name: {profile}; got {job.cluster.name!r}")
    validate(job.train, job.cluster.ranks_per_slot)
    return job
