"""Weights that an encoder starts from: another run's, a file's, or those of torchvision or timm.

Every tensor of the encoder must be in them, under its own name and with its own shape. All names may
have one beginning, such as `module.encoder.`, which is left out. `encoder.weights_keys` replaces
other beginnings. Files are read without running code.
"""

import hashlib
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cnnjepa.config import EncoderConfig, TrainConfig
from cnnjepa.methods._base import build_method
from cnnjepa.models.encoders import build_encoder
from cnnjepa.run import checkpoint
from cnnjepa.run.folder import HopelessError, RunFolder

LIBRARIES = ("torchvision", "timm")
_SHOWN = 3  # names in a message
_COUNTER = "num_batches_tracked"  # old checkpoints lack it; only a cumulative average reads it


class WeightsChangedError(HopelessError):
    """Raised when the weights to start from are not those that the run was planned with."""


def library_of(source: str) -> tuple[str, str] | None:
    """Return ('timm', 'resnet18.a1_in1k') for timm:resnet18.a1_in1k, None for a path."""
    library, colon, name = source.partition(":")
    return (library, name) if colon and library in LIBRARIES else None


def located(source: str) -> str:
    """Return `source` with an absolute path, so that a job in another folder finds it."""
    return source if not source or library_of(source) else str(Path(source).expanduser().absolute())


def _rule(source: str, rule: str, got: str, remedy: str) -> ValueError:
    return ValueError(f"encoder.weights must {rule}; got {source}, {got}: {remedy}")


def read(source: str) -> dict[str, Tensor]:
    """Return the tensors of `source` by name, on the CPU; raise ValueError where they cannot be read."""
    if library := library_of(source):
        return _of_library(source, *library)
    path = Path(source)
    if path.is_dir():
        return _of_run(source, path)
    if not path.exists():
        known = "a run folder, SWEEP_FOLDER/TRIAL, a .safetensors or torch file, torchvision:NAME or timm:NAME"
        raise _rule(source, f"name {known}", "which does not exist", "correct the path")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise _rule(source, "be a whole .safetensors file", f"which cannot be read ({_line(error)})", "copy it again") from error
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever bytes that are no torch file make of it
        is_code = isinstance(error, pickle.UnpicklingError) and any(word in str(error) for word in ("GLOBAL", "global", "reduce"))
        got = "which holds Python objects beside tensors" if is_code else f"which cannot be read ({_line(error)[:200]})"
        remedy = "save its state_dict() alone, or as .safetensors"
        raise _rule(source, "be a torch file of tensors, which is read without running code", got, remedy) from error
    tensors = dict(_flat(held, ""))
    if not tensors:
        raise _rule(source, "hold tensors by name", f"a {type(held).__name__} without any", "save the model's state_dict()")
    return tensors


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _flat(held: Any, start: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of nested mappings, their names joined by dots."""
    if isinstance(held, Tensor) and start:
        yield start.removesuffix("."), held
    elif isinstance(held, Mapping):
        for name, value in held.items():
            yield from _flat(value, f"{start}{name}.")


def _of_run(source: str, path: Path) -> dict[str, Tensor]:
    """Return the probed encoder of a run's newest checkpoint."""
    folder = RunFolder(path)
    config = folder.config()  # a ValueError says what a run folder must hold
    found = checkpoint.newest_good(folder.checkpoints)
    if not isinstance(config, TrainConfig) or found is None:
        got = "which is of another task" if found is not None else "which has no intact checkpoint"
        raise _rule(source, "be a run of an encoder with a checkpoint", got, "give another run")
    method = build_method(config, 1, torch.device("cpu"))
    try:
        method.load_state_dict(checkpoint.read(found, torch.device("cpu"))["method"])
    except RuntimeError as error:
        raise _rule(source, "be a run of this version", _line(error)[:200], "give a file that jobs.export wrote") from error
    tensors: dict[str, Tensor] = method.probe_encoder.state_dict()
    return tensors


def _of_library(source: str, library: str, name: str) -> dict[str, Tensor]:
    """Return the weights of a model by the library's own loader, from its cache where they are there."""
    try:
        if library == "torchvision":
            from torchvision.models import get_model_weights, get_weight

            weights = get_weight(name) if "." in name else get_model_weights(name).DEFAULT
            return dict(weights.get_state_dict(progress=False, check_hash=True))
        import timm

        tensors: dict[str, Tensor] = timm.create_model(name, pretrained=True).state_dict()
        return tensors
    except Exception as error:  # the libraries have no class of their own: an unknown name, no network, a damaged file
        remedy = (
            f"load it once where the network can be reached, with the same cache, or give a file; {library}'s own manual lists the names"
        )
        raise _rule(source, f"name weights that {library} can load here", _line(error)[:300], remedy) from error


def renamed(tensors: Mapping[str, Tensor], keys: Sequence[str]) -> dict[str, Tensor]:
    """Return `tensors` with the beginnings of their names replaced, each entry of `keys` being OLD=NEW; the first that fits counts."""
    pairs = [entry.partition("=")[::2] for entry in keys]
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        old, new = next((pair for pair in pairs if name.startswith(pair[0])), ("", ""))
        called = new + name.removeprefix(old)
        if called in found:
            raise ValueError(f"encoder.weights_keys must give each tensor a name of its own; got {called} for two of them")
        found[called] = tensor
    return found


def beginnings(names: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """Return what stands before the names of all `wanted`, each possibility."""
    known, first = set(names), wanted[0]
    starts = sorted(name.removesuffix(first) for name in names if name.endswith(first))
    return [start for start in starts if all(start + name in known for name in wanted)]


def matched(
    source: str, tensors: Mapping[str, Tensor], encoder: Mapping[str, Tensor], keys: Sequence[str]
) -> tuple[dict[str, Tensor], str]:
    """Return the encoder's tensors out of `tensors`, and a line about what did not match.

    Raise ValueError where one is missing or has another shape, with what to do.
    """
    wanted = [name for name in encoder if not name.endswith(_COUNTER)]
    named, start = renamed(tensors, keys), ""
    if not keys and any(name not in named for name in wanted):
        starts = beginnings(list(named), wanted)
        if len(starts) > 1:
            remedy = f"choose one with encoder.weights_keys=['{starts[0]}=']"
            raise _rule(source, "hold the encoder once", f"which holds it under {' and '.join(starts)}", remedy)
        start = starts[0] if starts else ""
        named = {name.removeprefix(start) if name.startswith(start) else f"{name} ": tensor for name, tensor in named.items()}
    lacking = [name for name in wanted if name not in named]
    if lacking:
        got = f"which lacks {_some(lacking)} of the encoder's {len(wanted)} tensors, and holds {_some(list(tensors))}"
        raise _rule(
            source, "hold every tensor of the encoder", got, "map its names with encoder.weights_keys=['OLD=NEW'], or choose its encoder"
        )
    for name in wanted:
        if named[name].shape != encoder[name].shape:
            shapes = f"where {name} is {_shape(named[name])} and the encoder's is {_shape(encoder[name])}"
            raise _rule(
                source, "hold tensors of the encoder's shapes", shapes, "choose the encoder, patch size and channels that it was made with"
            )
    found = {name: named[name].to(encoder[name].dtype) if name in named else encoder[name] for name in encoder}
    unused = [name.strip() for name in named if name.strip() not in encoder or name.endswith(" ")]
    parts = [f"encoder.weights {source}: {len(wanted)} of {len(wanted)} tensors of the encoder"]
    parts += [f"their names begin with {start}"] if start else []
    parts += [f"not in the encoder, and not used: {_some(unused)}"] if unused else []
    without = sum(name not in named for name in encoder)
    parts += [f"{without} counts of batches are not in it and begin at 0"] if without else []
    return found, "; ".join(parts)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return 16 hex digits of names, types and values."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def loaded(config: EncoderConfig, image_size: int, channels: int) -> tuple[dict[str, Tensor], str]:
    """Return the state of an encoder of `config` with its weights, and a line about what did not match; raise ValueError."""
    encoder = build_encoder(config, image_size, 0, channels).state_dict()
    return matched(config.weights, read(config.weights), encoder, config.weights_keys)


def planned(config: TrainConfig) -> dict[str, Tensor]:
    """Return the state of the encoder that a run of `config` starts from.

    Raise WeightsChangedError if it is not the one that the run was planned with, or cannot be read.
    """
    encoder = config.encoder
    try:
        state, _ = loaded(encoder, config.data.image_size, config.data.channels)
    except (ValueError, OSError) as error:
        raise WeightsChangedError(str(error)) from error
    if encoder.weights_digest and (now := digest(state)) != encoder.weights_digest:
        raise WeightsChangedError(changed(encoder, now))
    return state


def changed(encoder: EncoderConfig, now: str) -> str:
    """Return a line about weights that are not those that a run was planned with."""
    rule = f"encoder.weights must hold the weights that the run was planned with, {encoder.weights_digest}"
    return f"{rule}; got {now} in {encoder.weights}: restore them, or begin a new run without encoder.weights_digest"
