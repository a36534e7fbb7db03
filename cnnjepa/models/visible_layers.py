"""Which layer becomes what on tiles: one rule for each kind of layer that `visible` knows.

A rule is asked once, when a network is wrapped, and from constants alone. It answers with what comes out, a map or something
plain, and with what to run in each pass; or it refuses the layer by name.
"""

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnnjepa.models import visible_tiles as on_tiles
from cnnjepa.models.visible_call import Bound, Call, Kind, Map, Parts, Pass, Plain, Rule, both, fitted, flattened, reach, smaller
from cnnjepa.models.visible_tiles import Reach, WideTileMap
from cnnjepa.models.visible_trace import Place, defined_in


def by_position(call: Call) -> Bound:
    """Run torch's own operation: it looks at one position at a time."""
    known = call.maps()[0]
    if any((m.reduction, m.channels) != (known.reduction, known.channels) for m in call.maps()):
        call.at.refuse("combines maps of different shapes")
    kinds = call.args

    def run(p: Pass, /, *args: Any, **kwargs: Any) -> Any:
        fit = [v if isinstance(k, Map) else fitted(p, call.at, known, v) for v, k in zip(args, kinds, strict=True)]
        named = {key: v if isinstance(call.kwargs[key], Map) else fitted(p, call.at, known, v) for key, v in kwargs.items()}
        return call.do(*fit, **named)

    return replace(known, image=False), run


def same(call: Call) -> Bound:
    """Hand on what is given."""
    return replace(call.image(channels=call.args[0].channels), image=False), lambda p, /, x, *_, **__: x


def over_last(call: Call) -> Bound:
    """Run what acts on the last dimension alone."""
    call.image(channels=3)
    return by_position(call)


def layer_norm(call: Call) -> Bound:
    """LayerNorm over the channels of each position."""
    shape = call.module.normalized_shape if call.module is not None else call.args[1]
    if len(shape) != 1:
        call.at.refuse("normalises over rows or columns")
    return over_last(call)


def batch_norm(call: Call) -> Bound:
    """BatchNorm, with statistics over all visible positions of the batch."""
    known, module = call.image(), call.module
    if not isinstance(module, nn.BatchNorm2d):
        call.at.refuse("is not known")
    for name in ("drop", "act"):  # of timm's BatchNormAct2d
        after = getattr(module, name, None)
        if isinstance(after, nn.Module) and LAYERS.get(defined_in(after)) not in (by_position, same) and not _is_timms(after):
            Place(f"{call.at.path}.{name}", defined_in(after)).refuse("is not known as an activation")

    def run(p: Pass, /, x: Tensor) -> Any:
        if x.shape[2] == 1 and (module.training or module.running_mean is None):
            call.at.refuse("needs more than 1 visible position in training; got 1")
        return module(x)

    return replace(known, image=False), run


def _is_timms(module: nn.Module) -> bool:
    return defined_in(module).startswith("timm.layers.activations.")


def group_norm(call: Call) -> Bound:
    """GroupNorm, with statistics over the visible positions of each image."""
    known, m = call.image(), call.module

    def of_module(p: Pass, /, x: Tensor) -> Tensor:
        return on_tiles.group_norm(x, p.tiles, m.num_groups, m.weight, m.bias, m.eps)

    def of_function(
        p: Pass, /, x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
    ) -> Tensor:
        return on_tiles.group_norm(x, p.tiles, num_groups, weight, bias, eps)

    return replace(known, image=False), of_function if m is None else of_module


def conv_layer(call: Call) -> Bound:
    """A convolution."""
    known, m = call.image(), call.module
    if m.padding_mode != "zeros" or type(m)._conv_forward is not nn.Conv2d._conv_forward:
        call.at.refuse(f"pads with {m.padding_mode}" if m.padding_mode != "zeros" else "convolves in a way of its own")
    where = reach(call, m.kernel_size, m.stride, m.padding, m.dilation)
    convolve = on_tiles.conv_image if known.image else on_tiles.conv
    return smaller(known, where.stride), lambda p, /, x: convolve(x, m.weight, m.bias, p.tiles, p.side(known), where, m.groups)


def conv_function(call: Call) -> Bound:
    """A convolution whose weight is computed."""

    def arguments(
        input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
    ) -> tuple[Any, ...]:
        return input, weight, bias, stride, padding, dilation, groups

    known, (_, _, _, stride, padding, dilation, groups) = call.image(), arguments(*call.args, **call.kwargs)
    convolve = on_tiles.conv_image if known.image else on_tiles.conv

    def run(p: Pass, /, *args: Any, **kwargs: Any) -> Tensor:
        x, w, bias, *_ = arguments(*args, **kwargs)
        where = reach(call, tuple(w.shape[2:]), stride, padding, dilation)
        return convolve(x, w, bias, p.tiles, p.side(known), where, groups)

    return smaller(known, both(call, "stride", stride)), run


def max_pool(call: Call) -> Bound:
    """Max-pooling."""

    def arguments(
        x: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False, *rest: Any, **more: Any
    ) -> Reach:
        if any(rest) or any(more.values()):
            call.at.refuse("returns indices, which are those of no map")
        return reach(call, kernel_size, kernel_size if stride is None else stride, padding, dilation, ceil_mode)

    known, m = call.image(), call.module
    given = (m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, m.return_indices) if m is not None else call.args[1:]
    where = arguments(known, *given, **call.kwargs)
    return smaller(known, where.stride), lambda p, /, x, *_, **__: on_tiles.max_pool(x, p.tiles, p.side(known), where)


def average_pool(call: Call) -> Bound:
    """Average pooling of a fixed size."""

    def arguments(
        x: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False, count_include_pad: bool = True, *rest: Any
    ) -> tuple[Reach, bool]:
        if any(value is not None for value in rest):
            call.at.refuse("divides by a number of its own")
        where = reach(call, kernel_size, kernel_size if stride is None else stride, padding, 1, ceil_mode)
        # With ceil_mode, torch does not count what lies behind the padding, and `visible` cannot tell it apart.
        if count_include_pad and ceil_mode and where.edges[1] > where.padding:
            call.at.refuse("counts only a part of what is outside of the image")
        return where, count_include_pad

    known, m = call.image(), call.module
    given = (m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, m.divisor_override) if m is not None else call.args[1:]
    where, outside = arguments(known, *given, **call.kwargs)
    return smaller(known, where.stride), lambda p, /, x, *_, **__: on_tiles.average_pool(x, p.tiles, p.side(known), where, outside)


def _dimensions(given: Any) -> tuple[int, ...]:
    return tuple(sorted(d % 4 for d in ((given,) if isinstance(given, int) else given)))


def _of_images(call: Call, value: Callable[[Tensor, WideTileMap], Tensor], dim: Any, keepdim: bool) -> Bound:
    known = call.args[0]
    if dim is None or not isinstance(known, Map) or _dimensions(dim) != known.spatial:
        call.at.refuse(f"reduces dimensions {dim}, and not rows and columns together")

    def run(p: Pass, /, x: Tensor, *_: Any, **__: Any) -> Tensor:
        value_BC = value(x if known.channels == 1 else x.permute(0, 3, 1, 2), p.tiles)
        if not keepdim:
            return value_BC
        return value_BC[:, :, None, None] if known.channels == 1 else value_BC[:, None, None]

    return Plain(), run


def mean(call: Call) -> Bound:
    """Take the mean over the visible positions of each image."""

    def arguments(x: Any, dim: Any = None, keepdim: bool = False) -> tuple[Any, bool]:
        return dim, keepdim

    return _of_images(call, on_tiles.image_mean, *arguments(*call.args, **call.kwargs))


def norm(call: Call) -> Bound:
    """Take the L2 norm over the visible positions of each image."""

    def arguments(x: Any, p: Any = "fro", dim: Any = None, keepdim: bool = False) -> tuple[Any, Any, bool]:
        return p, dim, keepdim

    order, dim, keepdim = arguments(*call.args, **call.kwargs)
    if order not in (2, "fro"):
        call.at.refuse(f"takes a norm of order {order}")
    return _of_images(call, on_tiles.image_norm, dim, keepdim)


def whole_pool(call: Call) -> Bound:
    """Average over the visible positions of each image. Another size than 1 can only begin a head, which does not run."""
    size = call.module.output_size if call.module is not None else (*call.args, *call.kwargs.values())[1]
    if size not in (1, (1, 1), [1, 1]):
        return Plain(), lambda p, /, *_, **__: call.at.refuse(f"pools the whole image to {size}")
    return _of_images(call, on_tiles.image_mean, (2, 3), True)


def concatenate(call: Call) -> Bound:
    """Concatenate along channels."""

    def arguments(tensors: Any, dim: Any = 0) -> tuple[Any, Any]:
        return tensors, dim

    tensors, dim = arguments(*call.args, **call.kwargs)
    known = call.maps()[0]
    if isinstance(tensors, Parts) or dim % 4 != known.channels or any(not isinstance(t, Map) for t in tensors):
        call.at.refuse("concatenates something other than the channels of maps")
    if any((m.reduction, m.channels) != (known.reduction, known.channels) for m in tensors):
        call.at.refuse("concatenates maps of different shapes")
    return replace(known, image=False), lambda p, /, *args, **kwargs: call.do(*args, **kwargs)


def split(call: Call) -> Bound:
    """Split along channels."""

    def arguments(x: Any, size: Any, dim: Any = 0) -> Any:
        return dim

    known = call.args[0]
    if not isinstance(known, Map) or arguments(*call.args, **call.kwargs) % 4 != known.channels:
        call.at.refuse("splits something other than channels")
    return Parts(replace(known, image=False)), lambda p, /, *args, **kwargs: call.do(*args, **kwargs)


def item(call: Call) -> Bound:
    """Take some of the channels of a map, or one of several maps."""
    given, index = call.args
    if isinstance(given, Parts):
        kind: Kind = given if isinstance(index, slice) else given.of
        return kind, lambda p, /, parts, i: parts[i]
    full = index if isinstance(index, tuple) else (index,)
    others = [i for d, i in enumerate(full) if d != given.channels]
    if any(i != slice(None) for i in others) or not all(isinstance(i, slice) for i in full):
        call.at.refuse("takes a part of a map that is not some of its channels")
    return replace(given, image=False), lambda p, /, x, i: x[i]


def permute(call: Call) -> Bound:
    """Move the channels to the end, or back."""
    known, order = call.args[0], tuple(flattened((*call.args[1:], *call.kwargs.values())))
    if not isinstance(known, Map) or order not in ((0, 2, 3, 1), (0, 3, 1, 2)) or (known.channels == 1) != (order == (0, 2, 3, 1)):
        call.at.refuse(f"permutes dimensions to {order}")
    return replace(known, channels=4 - known.channels, image=False), lambda p, /, x, *_, **__: x.permute(order)


def attribute(call: Call) -> Bound:
    """Tell the shape of a map."""
    known, name = call.args
    if name != "shape":
        call.at.refuse(f"reads {name} of a map")
    return Plain(), lambda p, /, x, _: x.shape if known.image else p.shape(x, known)


def size(call: Call) -> Bound:
    """Tell the shape of a map, or one number of it."""
    known = call.args[0]

    def run(p: Pass, /, x: Tensor, dim: int | None = None) -> Any:
        shape = x.shape if known.image else p.shape(x, known)
        return shape if dim is None else shape[dim]

    return Plain(), run


def expand_as(call: Call) -> Bound:
    """Leave a value of each image as it is: it is repeated where it meets a map."""
    if isinstance(call.args[0], Map):
        call.at.refuse("expands a map")
    return Plain(), lambda p, /, value, _: value


def dropped(call: Call) -> Bound:
    """Dropout in a function: known only where it drops nothing."""

    def arguments(x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> bool:
        return p > 0 and training

    if arguments(*call.args, **call.kwargs):
        call.at.refuse("draws dropout in its own forward pass")
    return same(call)


def drop_path(call: Call) -> Bound:
    """Drop whole images from a branch, by the draws that the layer would make itself."""
    known, m = call.image(channels=call.args[0].channels), call.module
    if getattr(m, "mode", "row") != "row":
        call.at.refuse(f"drops in mode {m.mode}")

    def run(p: Pass, /, x: Tensor) -> Tensor:
        return x * fitted(p, call.at, known, m(x.new_ones(p.tiles.shape[0], 1, 1, 1))) if m.training else x

    return replace(known, image=False), run


def _names(module: str, names: str, rule: Rule) -> dict[str, Rule]:
    return {f"{module}.{name}": rule for name in names.split()}


# By the class that defines the forward pass.
LAYERS: dict[str, Rule] = {
    **_names("torch.nn.modules.conv", "Conv2d", conv_layer),
    **_names("torch.nn.modules.batchnorm", "_BatchNorm", batch_norm),
    **_names("timm.layers.norm_act", "BatchNormAct2d", batch_norm),
    **_names("torch.nn.modules.normalization", "GroupNorm", group_norm),
    **_names("torch.nn.modules.normalization", "LayerNorm", layer_norm),
    **_names("torch.nn.modules.linear", "Linear", over_last),
    **_names("torch.nn.modules.linear", "Identity", same),
    **_names("torch.nn.modules.pooling", "MaxPool2d", max_pool),
    **_names("torch.nn.modules.pooling", "AvgPool2d", average_pool),
    **_names("torch.nn.modules.pooling", "AdaptiveAvgPool2d", whole_pool),
    **_names("torch.nn.modules.dropout", "Dropout", by_position),
    **_names("timm.layers.drop", "DropPath", drop_path),
    **_names("torchvision.ops.stochastic_depth", "StochasticDepth", drop_path),
    **_names("torch.nn.modules.activation", "CELU ELU GELU Hardsigmoid Hardswish Hardtanh LeakyReLU LogSigmoid Mish", by_position),
    **_names("torch.nn.modules.activation", "PReLU ReLU SELU SiLU Sigmoid Softplus Softsign Tanh", by_position),
}

_ARITHMETIC = "add sub mul truediv neg iadd isub imul itruediv pow"
_TORCH = "add sub mul div neg abs square sqrt exp tanh sigmoid relu clamp addcmul"
_FUNCTIONAL = "relu relu6 leaky_relu elu selu celu gelu silu mish hardswish hardsigmoid hardtanh softplus tanh sigmoid"
FUNCTIONS: dict[Any, Rule] = {
    **{getattr(operator, name): by_position for name in _ARITHMETIC.split()},
    **{getattr(torch, name): by_position for name in _TORCH.split()},
    **{getattr(F, name): by_position for name in _FUNCTIONAL.split()},
    F.conv2d: conv_function,
    F.group_norm: group_norm,
    F.layer_norm: layer_norm,
    F.linear: over_last,
    F.max_pool2d: max_pool,
    F.avg_pool2d: average_pool,
    F.adaptive_avg_pool2d: whole_pool,
    F.dropout: dropped,
    torch.mean: mean,
    torch.cat: concatenate,
    torch.split: split,
    torch.chunk: split,
    torch.permute: permute,
    operator.getitem: item,
    getattr: attribute,
}
_METHODS = "add add_ sub sub_ mul mul_ div div_ neg abs square sqrt exp clone tanh tanh_ sigmoid sigmoid_ relu relu_ clamp clamp_ addcmul"
METHODS: dict[str, Rule] = {
    **dict.fromkeys(_METHODS.split(), by_position),
    "contiguous": same,
    "mean": mean,
    "norm": norm,
    "split": split,
    "chunk": split,
    "permute": permute,
    "size": size,
    "expand_as": expand_as,
}
# These take the image before it is cut into tiles.
WHOLE_IMAGE: set[Any] = {conv_layer, conv_function, attribute, size}
