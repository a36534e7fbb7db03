"""What a rule of models/visible_layers.py is asked, and what it answers.

Everything that is not a map is plain: weights, and what was summed over an image, such as the gates of squeeze-and-excitation.
Operations on plain values alone run as they are.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from cnnjepa.models.visible_tiles import Reach, WideTileMap, for_positions
from cnnjepa.models.visible_trace import Place


@dataclass(frozen=True)
class Map:
    """A feature map, known when a network is wrapped: how much smaller than the image, and which dimension has its channels."""

    reduction: int = 1
    channels: int = 1  # 1 in [B, C, H, W], 3 in [B, H, W, C]
    image: bool = False  # the masked image itself, [B, C, H, W], which is not yet cut into tiles

    @property
    def spatial(self) -> tuple[int, int]:
        """Return the dimensions of rows and columns."""
        return (2, 3) if self.channels == 1 else (1, 2)


@dataclass(frozen=True)
class Parts:
    """A tuple of maps of some of the channels each."""

    of: Map


class Plain:
    """What has no positions."""


Kind: TypeAlias = Map | Parts | Plain


@dataclass(frozen=True)
class Pass:
    """One mask and one batch."""

    tiles: WideTileMap
    cell: int
    image: Tensor  # [B, C, H, W], zero where hidden

    def side(self, known: Map) -> int:
        """Return the positions per side of a map's tiles."""
        return self.cell // known.reduction

    def shape(self, x: Tensor, known: Map) -> torch.Size:
        """Return the shape that a map has in the network that is wrapped."""
        b, h, w = self.tiles.shape
        height, width, c = h * self.side(known), w * self.side(known), x.shape[known.channels]
        return torch.Size((b, c, height, width) if known.channels == 1 else (b, height, width, c))


Run: TypeAlias = Callable[..., Any]  # takes the Pass, then what the layer takes
Bound: TypeAlias = tuple[Kind, Run]


@dataclass(frozen=True)
class Call:
    """One operation of a network: what it is given, constants as they are and all else by its kind."""

    at: Place
    do: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    module: Any = None

    def maps(self) -> list[Map]:
        """Return the maps among what is given."""
        return [given for given in flattened((self.args, self.kwargs)) if isinstance(given, Map)]

    def image(self, *, channels: int = 1) -> Map:
        """Return the one map that is given; refuse unless it is the first and has its channels there."""
        if not self.args or not isinstance(self.args[0], Map) or len(self.maps()) > 1:
            self.at.refuse("takes its map in another way than `visible` knows")
        if self.args[0].channels != channels:
            self.at.refuse(f"needs its channels in dimension {channels}, and has them in {self.args[0].channels}")
        return self.args[0]


Rule: TypeAlias = Callable[[Call], Bound]


def flattened(given: Any) -> Iterator[Any]:
    """Return what is in nested tuples, lists and dicts."""
    for value in given.values() if isinstance(given, dict) else given:
        if isinstance(value, tuple | list | dict):
            yield from flattened(value)
        else:
            yield value


def both(call: Call, what: str, given: Any) -> int:
    """Return the one number for both directions."""
    numbers = {given} if isinstance(given, int) else set(given) if isinstance(given, tuple | list) else set()
    if len(numbers) != 1 or not isinstance(number := next(iter(numbers)), int):
        call.at.refuse(f"a {what} of {given} is not supported")
    return number


def reach(call: Call, kernel: Any, stride: Any, padding: Any, dilation: Any = 1, ceil: bool = False) -> Reach:
    """Return where a kernel reads; refuse one whose outputs do not belong to cells."""
    found = Reach(both(call, "kernel", kernel), both(call, "stride", stride), 0, both(call, "dilation", dilation))
    same, valid = padding == "same" and found.stride == 1 and found.span % 2, padding == "valid"
    before = found.span // 2 if same else 0 if valid else both(call, "padding", padding)
    found = replace(found, padding=before)
    if not found.fits(ceil):
        shown = f"kernel {found.kernel}, stride {found.stride}, padding {found.padding}, dilation {found.dilation}"
        call.at.refuse(f"with {shown} its output is not exactly {found.stride} times smaller than its input")
    return found


def smaller(known: Map, stride: int) -> Map:
    """Return the map that a layer of some stride makes."""
    return Map(known.reduction * stride)


def fitted(p: Pass, at: Place, known: Map, value: Any) -> Any:
    """Return a plain value so that it broadcasts against a flat map as against the whole one."""
    if not isinstance(value, Tensor) or value.numel() == 1:
        return value
    shape = (1,) * (4 - value.ndim) + tuple(value.shape)
    if len(shape) > 4 or any(shape[d] != 1 for d in known.spatial):
        at.refuse(f"combines a map with a tensor of shape {list(value.shape)}, which has values for single positions")
    if shape[0] == 1:
        return value
    of_positions = for_positions(value.reshape(shape[0], -1), p.tiles, p.side(known))
    return of_positions if known.channels == 1 else of_positions.permute(0, 2, 3, 1)
