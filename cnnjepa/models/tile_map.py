"""Which rows each tile reads: the indices of tiled execution (cnnjepa/models/tiles.py), computed once for a mask.

Shapes: N tiles, S positions per side, M = N x S x S rows, K x K kernels, W positions per side of a
tile with its edges.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cnnjepa.models.masked import Visibility, positions

# cuDNN plans again, in milliseconds, for each new number of tiles. On CUDA, convolutions see only
# this many different numbers.
SHAPES = {"cuda": 32}


class TileMap:
    """Rows that each tile reads, for one mask; computed once, without a CUDA synchronisation."""

    def __init__(self, visibility: Visibility) -> None:
        self.shape = visibility.shape
        self.cells = visibility.cells  # [N]
        self.count = len(self.cells)  # of tiles, some of which may have no content: see RoomyTileMap
        # Tiles without content, added for convolutions only.
        self.padding = -self.count % -(-self.shape.numel() // SHAPES.get(self.cells.device.type, self.shape.numel()))
        # [N, 3, 3] numbers of each tile and of those around it, N if hidden or outside the image.
        self.around = self.neighbours(1, self.count)
        self._known: dict[tuple[int, ...], Any] = {}

    def neighbours(self, radius: int, outside: int) -> Tensor:
        """Return the numbers of the tiles around each, [N, 2 radius + 1, 2 radius + 1]: N if hidden, `outside` outside the image."""
        numbers = torch.full((self.shape.numel(),), self.count, dtype=torch.long, device=self.cells.device)
        numbers[self.cells] = torch.arange(self.count, device=self.cells.device)
        padded, width = F.pad(numbers.view(self.shape), (radius,) * 4, value=outside), 2 * radius + 1
        return padded.unfold(1, width, 1).unfold(2, width, 1).flatten(0, 2).index_select(0, self.cells)

    def with_content(self, side: int) -> Tensor | None:
        """Return the number of rows with content on tiles of `side`, a scalar; None if all have."""
        return None

    def clear(self, x_MC: Tensor, side: int) -> Tensor:
        """Set rows without content to zero, in place."""
        return x_MC

    def spread(self, x_MC: Tensor, side: int) -> Tensor:
        """Return rows as a map [B, C, h S, w S], zero where hidden."""
        b, h, w = self.shape[0], self.shape[1] * side, self.shape[2] * side
        key = side, 0
        if key not in self._known:
            self._known[key] = positions(self.cells, self.shape, h, w)
        beyond = 0 if self.with_content(side) is None else side * w  # where tiles without content are put
        whole = x_MC.new_zeros(b * h * w + beyond, x_MC.shape[1]).index_copy(0, self._known[key], x_MC)
        return whole[: b * h * w].view(b, h, w, -1).permute(0, 3, 1, 2)

    def window(self, side: int, before: int, after: int) -> Tensor:
        """Return the rows behind each tile and its edges, [N + padding, W, W]; M where hidden."""
        key = side, before, after
        if key not in self._known:
            reach = torch.arange(-before, side + after, device=self.cells.device)
            step, inside = reach.div(side, rounding_mode="floor"), reach % side
            tile = self.around[:, step[:, None] + 1, step[None] + 1]
            row, end = tile * side**2 + inside[:, None] * side + inside[None], self.count * side**2
            self._known[key] = F.pad(torch.where(tile == self.count, end, row), (0, 0, 0, 0, 0, self.padding), value=end)
        return self._known[key]

    def patches(self, side: int, kernel: int, stride: int) -> Tensor:
        """Return the row behind each tap of each output position, [N s s K K], s = side/stride."""
        key = side, kernel, stride, 0
        if key not in self._known:
            window = self.window(side, kernel // 2, kernel // 2 - stride + 1)[: self.count]
            self._known[key] = window.unfold(1, kernel, stride).unfold(2, kernel, stride).flatten()
        return self._known[key]

    def taps(self, side: int, kernel: int, stride: int) -> "Taps":
        """Return the pairs of output and visible input rows, tap by tap.

        Not for CUDA: the host would have to wait for their numbers.
        """
        key = side, kernel, stride, 1
        if key not in self._known:
            self._known[key] = Taps(self.patches(side, kernel, stride).view(-1, kernel**2), self.count * side**2)
        return self._known[key]


class RoomyTileMap(TileMap):
    """The map of a size that masks with fewer tiles share, made of tensors alone, as a CUDA graph needs it.

    The last tiles, fewer than `spare`, have no content: they read zeros, no tile reads them, and
    their rows are zero after each layer.
    """

    def __init__(self, shape: torch.Size, cells: Tensor, around: Tensor, content: Tensor, spare: int) -> None:
        """Take what `roomy` returns."""
        self.shape, self.cells, self.around = shape, cells, around
        self.count, self.padding = len(cells), 0
        self._content, self._spare = content, min(spare, len(cells))
        self._known = {}

    def with_content(self, side: int) -> Tensor:
        """Return the number of rows with content on tiles of `side`, a scalar."""
        return self._content * side**2

    def clear(self, x_MC: Tensor, side: int) -> Tensor:
        """Set rows without content to zero, in place."""
        numbers = torch.arange(self.count - self._spare, self.count, device=x_MC.device)
        x_MC[-self._spare * side**2 :].view(self._spare, -1).mul_((numbers < self._content)[:, None])
        return x_MC


def spare_of(shape: torch.Size) -> int:
    """Return how many numbers of tiles share a size, so that there are at most 32 sizes."""
    return -(-shape.numel() // SHAPES["cuda"])


def roomy(visibility: Visibility) -> tuple[Tensor, Tensor, Tensor]:
    """Return cells [R], around [R, 3, 3] and a scalar, the number of tiles with content, for a RoomyTileMap of R tiles."""
    exact = TileMap(visibility)
    room = -(-exact.count // spare_of(exact.shape)) * spare_of(exact.shape)
    around = torch.where(exact.around == exact.count, room, exact.around)
    rest = room - exact.count
    return (
        F.pad(exact.cells, (0, rest), value=exact.shape.numel()),  # the cell after the last
        F.pad(around, (0, 0, 0, 0, 0, rest), value=room),
        # filled on the device: the host's number does not have to travel
        torch.full((), exact.count, dtype=torch.float64, device=exact.cells.device),
    )


class Taps:
    """Pairs (output row, visible input row) for each tap of a kernel, and how to sum over taps."""

    def __init__(self, rows_MT: Tensor, inputs: int) -> None:
        outputs, taps = rows_MT.shape
        tap, out = (rows_MT.t() < inputs).nonzero(as_tuple=True)
        into = rows_MT.t()[tap, out]
        self.count = len(tap)
        self.sizes = tap.bincount(minlength=taps).tolist()
        self.pairs = list(zip(out.split(self.sizes), into.split(self.sizes), strict=True))
        self.by_output, self.by_input = self._sorted(out, outputs), self._sorted(into, inputs)

    @staticmethod
    def _sorted(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
        sizes = rows.bincount(minlength=count)
        return rows.argsort(stable=True), sizes.cumsum(0) - sizes

    @staticmethod
    def total(products: Tensor, order: tuple[Tensor, Tensor]) -> Tensor:
        """Return the sum of the products that belong to each row."""
        return F.embedding_bag(order[0], products, order[1], mode="sum")
