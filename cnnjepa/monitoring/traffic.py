"""Bytes that the kernels of a training step move, and their launches, computed from its ops and the shapes of their tensors.

Nothing is measured: no time, no cache. What counts:

- Each op reads its tensor arguments and writes its results once, as if no cache kept anything from one op to the next. Of a tensor that is
  expanded, the elements that exist count.
- A view moves nothing, nor does an allocation. `zeros` and `full` write; `copy_` and an `out=` do not read what they write.
- An op in place reads and writes. A cast, by autocast or not, is an op: so is a copy to another memory format.
- BatchNorm reads its input twice in training, for its statistics and to normalise, and both of its inputs twice in the backward pass: a
  feature map is larger than a cache.
- A gather (`index_select`) reads as many elements as it writes, and its indices; what it adds to (`index_add`) is read too.
- Max-pooling writes an index of 8 bytes beside each value, as CUDA does, also without a gradient.
- A fused or `foreach` op reads and writes all of its tensors once; AdamW does not write gradients.

Not modelled: what cuDNN and cuBLAS do inside (other memory formats, workspaces, split sums), a second read of an input by a convolution's
tiling, caches, the loader's copy to the device, and the masks, which are drawn on the host.

A launch is an op that moves bytes. BatchNorm counts as 2, and a convolution's backward pass as one for each gradient that is asked for; a
`foreach` or fused op as one for each 100 tensors. A library may take more.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FOREACH_TENSORS = 100  # of one launch
_NOTHING: tuple[str, ...] = (
    "prim::device",
    "aten::empty",
    "aten::new_empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty_strided",
)
_NOTHING += ("aten::_unsafe_view", "aten::detach", "aten::alias", "aten::lift_fresh")
_FILLS = ("new_zeros", "zeros", "zeros_like", "ones_like", "full", "full_like", "new_full", "new_ones", "scalar_tensor", "arange")
_OVERWRITES = ("copy_", "fill_", "zero_")
_GATHERS = ("index_select", "index")
_NORMS = ("native_batch_norm", "batch_norm", "native_batch_norm_backward", "cudnn_batch_norm", "cudnn_batch_norm_backward")
KINDS = {
    "products": ("mm", "addmm", "conv2d", "convolution", "convolution_backward", "linear", "matmul", "bmm"),
    "BatchNorm": _NORMS,
    "ReLU and sums": ("relu", "relu_", "threshold_backward", "add_", "add"),
    "gathers": (*_GATHERS, "index_add", "index_put_", "index_copy", "cat", "constant_pad_nd", "slice_backward"),
    "casts and copies": ("_to_copy", "to", "clone", "copy_", "contiguous"),
}
LAYERS, REST = ("products", "BatchNorm", "ReLU and sums"), "the rest"


@dataclass(frozen=True)
class Moved:
    """One op: what it moves."""

    op: str
    part: str
    layer: str
    backward: bool
    read: int
    written: int
    launches: int
    shapes: tuple[tuple[int, ...], ...]

    @property
    def bytes(self) -> int:
        """Read and written."""
        return self.read + self.written

    @property
    def kind(self) -> str:
        """Which of KINDS, or the rest."""
        return next((kind for kind, ops in KINDS.items() if self.op in ops), REST)


def _size(x: Tensor) -> int:
    """Bytes of the elements that exist: an expanded dimension has one."""
    count = 1
    for n, stride in zip(x.shape, x.stride(), strict=True):
        count *= n if stride or n == 0 else 1
    return count * x.element_size()


def tensors(tree: Any) -> list[Tensor]:
    """Return the tensors of nested arguments."""
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


def _arguments(func: Any, args: Any, kwargs: Any) -> Iterator[tuple[bool, bool, list[Tensor]]]:
    """Whether it is written, whether it is `out=`, and the tensors, of each argument."""
    for i, argument in enumerate(func._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        if found := tensors(value):
            written = argument.alias_info is not None and argument.alias_info.is_write
            yield written, written and argument.is_out, found


def moved(func: Any, args: Any, kwargs: Any, out: Any) -> tuple[int, int, int]:
    """Bytes read and written, and launches, of one op: the rules at the top."""
    name, results = func._schema.name.partition("::")[2], tensors(out)
    if func._schema.name in _NOTHING or func.namespace != "aten" or func.is_view:
        return 0, 0, 0
    read = written = count = 0
    inputs: list[Tensor] = []
    for is_written, is_out, found in _arguments(func, args, kwargs):
        size = sum(map(_size, found))
        written += size if is_written else 0
        read += 0 if is_out or (is_written and name in _OVERWRITES) else size
        count += len(found)
        inputs += found
    fresh = [r for r in results if not any(_same(r, x) for x in inputs)]
    if not written and not fresh:
        return 0, 0, 0  # such as `to` of what is that already
    written += sum(map(_size, fresh))
    if name in _FILLS:
        read = 0
    if name in _GATHERS:
        read += sum(map(_size, fresh)) - _size(inputs[0])
    if name in _NORMS:
        read += sum(_size(x) for x in inputs if x.ndim > 1)
    if name == "max_pool2d":
        written += 8 * fresh[0].numel()
    if name == "_fused_adamw_":
        written -= sum(map(_size, args[1]))  # gradients are scaled back only by a gradient scaler
    return read, written, _launches(name, args, count, func)


def _launches(name: str, args: Any, count: int, func: Any) -> int:
    if name in _NORMS:
        return 2
    if name == "convolution_backward":
        return sum(args[-1])
    lists = max(1, sum(a.type.kind() == "ListType" and "Tensor" in str(a.type) for a in func._schema.arguments))
    return -(-count // lists // FOREACH_TENSORS) if name.startswith(("_foreach", "_fused")) else 1


def _nowhere() -> tuple[str, str, bool]:
    return "", "", False


class Traffic(TorchDispatchMode):
    """Sees each op of a step; `look` says to which part and layer one belongs, and whether it is of the backward pass."""

    def __init__(self, look: Callable[[], tuple[str, str, bool]] = _nowhere) -> None:
        super().__init__()
        self._look = look
        self.found: list[Moved] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op and note what it moves."""
        out = func(*args, **(kwargs or {}))
        read, written, launches = moved(func, args, kwargs or {}, out)
        if launches:
            shapes = tuple(tuple(x.shape) for x in tensors((args, kwargs)))
            self.found.append(Moved(func._schema.name.partition("::")[2], *self._look(), read, written, launches, shapes))
        return out
