"""Find cluster profiles: files of slurm/cluster by their names, others by their paths."""

import functools
import hashlib
from pathlib import Path

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

# Name in Hydra's store -> the file that was read.
_read: dict[str, Path] = {}


def is_path(profile: str) -> bool:
    """Return whether a profile is given by the path of its file, and not by its name."""
    return "/" in profile or profile.endswith((".yaml", ".yml"))


def absolute(profile: str) -> str:
    """Return a profile so that it can be given in any folder."""
    return str(Path(profile).expanduser().absolute()) if is_path(profile) else profile


def stored(profile: str) -> str:
    """Return the name under which Hydra finds a profile; read its file if it is given by a path.

    Raise ValueError if the file cannot be read or holds no keys.
    """
    if not is_path(profile):
        return profile
    path = Path(absolute(profile))
    try:
        now = path.stat()
        return _stored(path, now.st_mtime_ns, now.st_size)
    except FileNotFoundError as error:
        raise ValueError(f"cluster must be a name, or the path of a file; got {profile}: there is no such file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be YAML; got {' '.join(str(error).split())}") from error
    except (OSError, OmegaConfBaseException) as error:
        raise ValueError(f"{path} must be a file of keys and values; got {' '.join(str(error).split())}") from error


@functools.lru_cache(64)  # a sweep composes every trial
def _stored(path: Path, _changed: int, _size: int) -> str:
    found = OmegaConf.load(path)
    if not isinstance(found, DictConfig):
        raise ValueError(f"{path} must be a file of keys and values; got a list")
    name = f"own-{hashlib.sha256(str(path).encode() + path.read_bytes()).hexdigest()[:12]}"
    ConfigStore.instance().store(group="cluster", name=name, node=found)
    _read[name] = path
    return name


def is_stored(name: str) -> bool:
    """Return whether `stored` has returned this name for a path."""
    return name in _read


def file_of(name: str) -> str:
    """Return the path of a profile's file, for messages: as it was given, or within the checkout."""
    return str(_read.get(name, f"slurm/cluster/{name}.yaml"))
