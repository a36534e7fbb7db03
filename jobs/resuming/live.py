"""Find the state that a running Python program holds: the objects behind its variables, by kind.

A walk begins at the variables of the program's functions that are running, and at its modules'. It
follows containers and the program's own objects, and knows what libraries' objects hold.
"""

import collections
import contextlib
import ctypes
import functools
import gc
import hashlib
import pickle
import random
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from cnnjepa.run import __name__ as run_package
from jobs.resuming.kinds import Kind

_DEPTH, _ITEMS = 9, 20_000
_SCALARS = (bool, int, float, complex, str, bytes, type(None))
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
# What a run is launched with, and what holds no state of a training.
_LEFT_OUT = ("jobs.", "sweeps.", f"{run_package}.", "pathlib", "logging", "threading", "concurrent.", "multiprocessing.", "_io")
Put = Callable[[Any], None]


@dataclass
class Item:
    """A piece of state that a program holds."""

    name: str  # as the program reaches it, such as trainer.sgd.state
    kind: Kind
    value: Any  # a copy
    put: Put | None = None  # sets it; None where that is impossible
    root: str = ""  # the variable that it belongs to
    digest: str = ""
    computed: bool = False  # whether it is a tensor on the way to the loss

    def __post_init__(self) -> None:
        """Compute the digest."""
        self.digest = self.digest or digest(self.value)


def digest(value: Any) -> str:
    """Return a checksum that is the same for equal values of any process."""
    found = hashlib.sha256()

    def add(part: Any) -> None:
        kind = type(part).__name__
        if hasattr(part, "detach"):
            found.update(f"tensor {part.dtype} {tuple(part.shape)}".encode())
            torch = sys.modules["torch"]
            found.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif hasattr(part, "tobytes") and hasattr(part, "dtype"):
            found.update(f"array {part.dtype} {part.shape}".encode())
            found.update(part.tobytes() if part.dtype != object else repr(part.tolist()).encode())
        elif isinstance(part, Mapping):
            found.update(f"mapping {len(part)}".encode())
            for key in sorted(part, key=repr):
                add(key)
                add(part[key])
        elif isinstance(part, (list, tuple, collections.deque)):
            found.update(f"sequence {len(part)}".encode())
            for one in part:
                add(one)
        elif isinstance(part, (set, frozenset)):
            found.update(repr(sorted(map(repr, part))).encode())
        elif isinstance(part, _SCALARS):
            found.update(f"{kind} {part!r};".encode())
        else:
            try:
                found.update(pickle.dumps(part))
            except Exception:  # what cannot be saved is compared by its type
                found.update(kind.encode())

    add(value)
    return found.hexdigest()[:16]


def copied(value: Any) -> Any:
    """Return `value` with its tensors and arrays copied to host memory."""
    if hasattr(value, "detach"):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {k: copied(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        found = [copied(v) for v in value]
        return found if isinstance(value, list) else tuple(found)
    return value.copy() if hasattr(value, "dtype") and hasattr(value, "copy") else value


def is_numbers(value: Any) -> bool:
    """Return whether `value` is a list of numbers alone, however nested."""
    if not isinstance(value, (list, tuple)) or not value:
        return False
    return all(isinstance(v, (bool, int, float)) or is_numbers(v) for v in value)


def _class(module: str, name: str) -> tuple[type, ...]:
    """Return a class of a library if that is loaded: what is not loaded has no objects."""
    found = getattr(sys.modules.get(module), name, None)
    return (found,) if isinstance(found, type) else ()


def set_local(frame: types.FrameType, name: str, value: Any) -> None:
    """Set a variable of a function that is running."""
    frame.f_locals[name] = value
    if sys.version_info < (3, 13):
        ctypes.pythonapi.PyFrame_LocalsToFast(ctypes.py_object(frame), ctypes.c_int(0))


@dataclass
class Walk:
    """One walk over the state of a program."""

    items: dict[str, Item] = field(default_factory=dict)
    seen: dict[int, Any] = field(default_factory=dict)  # kept, so that no id is used twice
    trained: set[int] = field(default_factory=set)  # ids of the parameters that an optimiser has
    root: str = ""
    late: list[Callable[[], None]] = field(default_factory=list)
    data: set[int] = field(default_factory=set)  # ids of generators that a loader or a sampler holds

    def add(self, name: str, kind: Kind, value: Any, put: Put | None) -> None:
        """Note an item, unless there is one of that name or there are too many."""
        if name not in self.items and len(self.items) < _ITEMS:
            computed = getattr(value, "grad_fn", None) is not None
            self.items[name] = Item(name, kind, copied(value), put, self.root, computed=computed)

    def visit(self, name: str, value: Any, put: Put | None, depth: int = 0, data: bool = False) -> None:
        """Note the state of `value` and of what it holds; `data` is true below what feeds data."""
        if isinstance(value, _SCALARS):
            if not isinstance(value, (str, bytes)) or len(value) < 200:
                self.add(name, Kind.sampler if data else Kind.value, value, put)
            return
        if isinstance(value, (type, types.ModuleType)) or depth > _DEPTH or type(value).__module__.startswith(_LEFT_OUT):
            return
        self._feeds(value, data)
        if id(value) in self.seen:
            return
        self.seen[id(value)] = value
        if not (self._random(name, value) or self._torch(name, value, depth, put) or self._arrays(name, value, put, data)):
            self._inside(name, value, depth, data)

    def _feeds(self, value: Any, data: bool) -> None:
        if data:
            self.data.add(id(value))

    def _random(self, name: str, value: Any) -> bool:
        numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
        if isinstance(value, random.Random):
            self.random(name, Kind.python, value, value.getstate(), value.setstate)
        elif numpy and isinstance(value, numpy.random.Generator):
            bits = value.bit_generator
            self.random(name, Kind.numpy, value, bits.state, functools.partial(setattr, bits, "state"))
        elif numpy and isinstance(value, numpy.random.RandomState):
            self.random(name, Kind.numpy, value, value.get_state(), value.set_state)
        elif torch and isinstance(value, torch.Generator):
            self.random(name, Kind.torch, value, value.get_state(), value.set_state)
        else:
            return False
        return True

    def random(self, name: str, kind: Kind, owner: Any, state: Any, put: Put) -> None:
        """Note a generator; one that a loader or a sampler holds decides the order of the data."""
        state, root = copied(state), self.root

        def note() -> None:
            found = Kind.order if id(owner) in self.data else kind
            self.items.setdefault(name, Item(name, found, state, put, root))

        self.late.append(note)

    def _torch(self, name: str, value: Any, depth: int, put: Put | None) -> bool:
        if "torch" not in sys.modules:
            return False
        own: Any = value
        if isinstance(value, _class("torch.optim", "Optimizer")):
            self._optimizer(name, value)
        elif isinstance(value, _class("torch.optim.lr_scheduler", "LRScheduler")):
            self._scheduler(name, value)
        elif isinstance(value, _class("torch.amp", "GradScaler")):
            self.add(name, Kind.scaler, own.state_dict(), own.load_state_dict)
        elif isinstance(value, _class("torch.nn", "Module")):
            self._module(name, value, depth)
        elif isinstance(value, _class("torch.utils.data", "DataLoader")):
            for part in ("sampler", "batch_sampler", "generator", "dataset"):
                self.visit(f"{name}.{part}", getattr(value, part), None, depth + 1, data=True)
        elif isinstance(value, (*_class("torch.utils.data", "Sampler"), *_class("torch.utils.data", "Dataset"))):
            self._inside(name, value, depth, data=True)
        else:
            return False
        return True

    def _optimizer(self, name: str, optimizer: Any) -> None:
        def put_state(state: Any) -> None:
            optimizer.load_state_dict({"state": copied(state), "param_groups": optimizer.state_dict()["param_groups"]})

        def put_groups(groups: Any) -> None:
            for group, values in zip(optimizer.param_groups, groups):
                group.update(values)

        self.add(f"{name}.state", Kind.optimizer, optimizer.state_dict()["state"], put_state)
        groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        self.add(f"{name}.param_groups", Kind.rate, groups, put_groups)

    def _scheduler(self, name: str, scheduler: Any) -> None:
        plain = {k: v for k, v in vars(scheduler).items() if isinstance(v, _SCALARS) or is_numbers(v)}
        self.add(name, Kind.scheduler, plain, vars(scheduler).update)
        for number, inner in enumerate(getattr(scheduler, "_schedulers", ())):
            self.visit(f"{name}._schedulers[{number}]", inner, None, 1)

    def _module(self, name: str, module: Any, depth: int) -> None:
        torch = sys.modules["torch"]
        followed = isinstance(module, _class("torch.optim.swa_utils", "AveragedModel"))

        def put(tensor: Any) -> Put:
            def copy(value: Any) -> None:
                with torch.no_grad():
                    tensor.copy_(value)

            return copy

        for path, part in module.named_modules():
            self.seen[id(part)] = part
            of = f"{name}.{path}" if path else name
            norm = isinstance(part, _class("torch.nn.modules.batchnorm", "_NormBase"))
            for key, tensor in part._parameters.items():
                if tensor is not None:
                    self.seen[id(tensor)] = tensor
                    trained = id(tensor) in self.trained or (not self.trained and not followed)
                    self.add(f"{of}.{key}", Kind.weights if trained else Kind.average, tensor, put(tensor))
            for key, tensor in part._buffers.items():
                if tensor is not None:
                    self.seen[id(tensor)] = tensor
                    self.add(f"{of}.{key}", Kind.statistics if norm or key in _STATISTICS else Kind.buffer, tensor, put(tensor))
        for path, part in module.named_modules():  # after all parts have the names of the module that they are in
            of = f"{name}.{path}" if path else name
            for key, own in list(vars(part).items()):
                if not key.startswith("_"):
                    self.visit(f"{of}.{key}", own, functools.partial(setattr, part, key), depth + 1)

    def _arrays(self, name: str, value: Any, put: Put | None, data: bool) -> bool:
        numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
        kind = Kind.sampler if data else Kind.array
        if torch and isinstance(value, torch.Tensor):

            def put_tensor(new: Any) -> None:
                with torch.no_grad():
                    value.copy_(new) if value.shape == new.shape else put and put(new)

            self.add(name, Kind.weights if id(value) in self.trained else kind, value, put_tensor)
        elif numpy and isinstance(value, (numpy.ndarray, numpy.generic)):

            def put_array(new: Any) -> None:
                if isinstance(value, numpy.ndarray) and value.shape == new.shape and value.flags.writeable:
                    value[...] = new
                elif put:
                    put(new)

            self.add(name, kind if value.ndim else (Kind.sampler if data else Kind.value), value, put_array)
        elif is_numbers(value):
            self.add(name, kind, value, functools.partial(value.__setitem__, slice(None)) if isinstance(value, list) else put)
        else:
            return False
        return True

    def _inside(self, name: str, value: Any, depth: int, data: bool) -> None:
        if isinstance(value, dict):
            for key, inner in list(value.items()):
                self.visit(f"{name}[{key!r}]", inner, functools.partial(value.__setitem__, key), depth + 1, data)
        elif isinstance(value, (list, tuple, collections.deque)):
            for number, inner in enumerate(list(value)[:2000]):
                set_it = None if isinstance(value, tuple) else functools.partial(value.__setitem__, number)
                self.visit(f"{name}[{number}]", inner, set_it, depth + 1, data)
        elif isinstance(value, types.GeneratorType):
            frame: Any = value.gi_frame  # None once it has ended
            for key, inner in list(frame.f_locals.items()) if frame is not None else ():
                self.visit(f"{name}().{key}", inner, functools.partial(set_local, frame, key), depth + 1, data)
        elif isinstance(value, functools.partial):
            self.visit(f"{name}.args", [*value.args, value.keywords], None, depth + 1, data)
        elif isinstance(value, types.MethodType):
            self.visit(f"{name}.__self__", value.__self__, None, depth + 1, data)
        elif isinstance(value, types.FunctionType):
            for key, cell in zip(value.__code__.co_freevars, value.__closure__ or ()):
                if _filled(cell):
                    self.visit(f"{name}.{key}", cell.cell_contents, functools.partial(setattr, cell, "cell_contents"), depth + 1, data)
        else:
            for key, inner in _attributes(value):
                self.visit(f"{name}.{key}", inner, functools.partial(setattr, value, key), depth + 1, data)


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    names = [*getattr(value, "__dict__", {})]
    for base in type(value).__mro__:
        slots = vars(base).get("__slots__", ())
        names += [slots] if isinstance(slots, str) else list(slots)
    for name in names:
        if isinstance(name, str) and not name.startswith("__"):
            with contextlib.suppress(Exception):  # what a library does not give holds no state
                yield name, getattr(value, name)


def _from_gc() -> Iterable[tuple[str, Any]]:
    """Yield the objects of torch that hold state, with a name by class and number."""
    wanted = (*_class("torch.optim", "Optimizer"), *_class("torch.optim.lr_scheduler", "LRScheduler"), *_class("torch.amp", "GradScaler"))
    count: collections.Counter[str] = collections.Counter()
    for value in gc.get_objects() if wanted else ():
        if issubclass(type(value), wanted):
            count[type(value).__name__] += 1
            yield f"{type(value).__name__} #{count[type(value).__name__]}", value


def live_items(frames: Iterable[types.FrameType], is_own: Callable[[str], bool], skip: Iterable[Any] = ()) -> dict[str, Item]:
    """Return the state that a program holds, by name.

    `frames` are its functions that are running, innermost first; `is_own` says whether a file is
    the program's. What is in `skip` is left out.
    """
    walk, kept = Walk(), list(frames)
    walk.seen.update({id(value): value for value in skip})
    unnamed = list(_from_gc())
    for _, value in unnamed:
        for group in getattr(value, "param_groups", ()):
            walk.trained |= {id(p) for p in group["params"]}
    modules = {id(f.f_globals): f.f_globals for f in kept}
    for frame in kept:
        for name, value in list(frame.f_locals.items()):
            walk.root = name
            walk.visit(name, value, functools.partial(set_local, frame, name))
    for space in modules.values():
        for name, value in list(space.items()):
            if not name.startswith("__") and not isinstance(value, (types.FunctionType, types.BuiltinFunctionType)):
                walk.root = name
                walk.visit(name, value, functools.partial(space.__setitem__, name))
    for name, value in unnamed:
        walk.root = name
        walk.visit(name, value, None)
    _globals(walk)
    for note in walk.late:
        note()
    return walk.items


def _globals(walk: Walk) -> None:
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    walk.root = ""
    walk.late.append(lambda: walk.add("random.getstate()", Kind.python, random.getstate(), random.setstate))
    if numpy and "numpy.random" in sys.modules:
        walk.late.append(lambda: walk.add("np.random.get_state()", Kind.numpy, numpy.random.get_state(), numpy.random.set_state))
    if torch:
        walk.late.append(lambda: walk.add("torch.get_rng_state()", Kind.torch, torch.get_rng_state(), torch.set_rng_state))
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            states = torch.cuda.get_rng_state_all
            walk.late.append(lambda: walk.add("torch.cuda.get_rng_state_all()", Kind.torch, states(), torch.cuda.set_rng_state_all))
