"""Run the context encoder on tiles from CUDA graphs: two launches in place of a thousand, for forward and backward pass.

A graph needs sizes that do not change, and each mask has its own number of tiles. So masks share
the sizes of `RoomyTileMap`, of which there are 32 for a shape of the batch. torch captures a graph
for a size when it first comes up (torch.cuda.make_graphed_callables). BatchNorm is corrected for
the tiles without content (counted_norm.py), which rounds differently from the pass without a graph.

Two checks come first; if one fails, the encoder runs without graphs, with a warning. With the first
batch, on a copy of the encoder in float64, features, all gradients and statistics of a few images
must be those of the pass without a graph to `BOUND`. With the first batch of each size, the captured
pass must have the bits of the same pass uncaptured. Nothing random is in it, so that the same
batches give the same bits again.
"""

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cnnjepa.models.masked import Visibility
from cnnjepa.models.self_check import largest_difference, outcome, same_bits, unmoved
from cnnjepa.models.tile_map import RoomyTileMap, roomy, spare_of
from cnnjepa.models.tiles import computed_in, encode_tiles, pass_tiles

log = logging.getLogger(__name__)
BOUND = 1e-9  # of the largest difference, over the largest value of its tensor
CHECKED_IMAGES = 4


class _Pass(nn.Module):
    """The pass of one size: whatever differs between batches is an argument."""

    def __init__(self, encoder: Any, shape: torch.Size, dtype: torch.dtype) -> None:
        super().__init__()
        self.encoder, self.shape, self.dtype = encoder, shape, dtype

    def forward(self, masked_BCHW: Tensor, cells: Tensor, around: Tensor, content: Tensor) -> Tensor:
        """Return the features, [B, C, h, w], of images whose hidden cells are zero."""
        tiles, net = RoomyTileMap(self.shape, cells, around, content, spare_of(self.shape)), self.encoder
        return pass_tiles((net.conv1, net.bn1), net.small, [net.blocks()], masked_BCHW, tiles, self.dtype)[0]


class TileGraphs:
    """Graphs of `encoder`, a ResNet of models/resnet.py. `cuda` is torch.cuda; tests pass a stand-in that records ops and repeats them."""

    def __init__(self, encoder: Any, cuda: Any = torch.cuda) -> None:
        self._encoder, self._cuda = encoder, cuda
        self._graphs: dict[tuple[Any, ...], Callable[..., Tensor]] = {}
        self._is_off = self._captures = False
        self._pool: Any = None
        for parameter in encoder.parameters():
            parameter.register_hook(self._own)

    def _own(self, gradient: Tensor) -> Tensor:
        """Return a gradient that the next pass does not overwrite: all sizes share one memory."""
        return gradient if self._is_off or self._captures else gradient.clone()

    def __deepcopy__(self, memory: dict[int, Any]) -> None:
        """A copy of the encoder has no graphs."""

    def __call__(self, image_BCHW: Tensor, visibility: Visibility, plain: Callable[[], Tensor]) -> Tensor:
        """Return the features of tiled execution; `plain` computes them without a graph.

        Its backward pass must be done before the next call.
        """
        if self._is_off:
            return plain()
        if not self._cuda.is_available():
            self._turn_off("there is no CUDA device")
            return plain()
        dtype = computed_in(image_BCHW)
        given = image_BCHW * visibility.at(image_BCHW), *roomy(visibility)
        key = visibility.shape, *((t.shape, t.stride(), t.dtype) for t in given), dtype
        if key not in self._graphs and not self._begun(key, given, visibility, dtype):
            return plain()
        return self._graphs[key](*given)

    def _begun(self, key: tuple[Any, ...], given: Sequence[Tensor], visibility: Visibility, dtype: torch.dtype) -> bool:
        """Capture a size; return whether it is used. Statistics stay as they were."""
        # The pass computes in the dtype that it is given.
        with torch.autocast(given[0].device.type, enabled=False):
            try:
                cause = "" if self._graphs else self._difference(given[0], visibility)
                if not cause:
                    graph, plain = (_Pass(self._encoder, visibility.shape, dtype) for _ in range(2))
                    graphed = self._captured(graph, given)
                    if not same_bits(outcome(graphed, self._encoder, given), outcome(plain, self._encoder, given)):
                        cause = "a captured pass must give the same bits as the pass itself; got others"
            except RuntimeError as error:
                cause = str(error).partition("\n")[0]
        if cause:
            self._turn_off(cause)
            return False
        self._graphs[key] = graphed
        return True

    def _difference(self, masked_BCHW: Tensor, visibility: Visibility) -> str:
        """Return how the pass that would be captured differs from the one without graphs in float64; "" if it does not."""
        net, images = copy.deepcopy(self._encoder).double(), masked_BCHW[:CHECKED_IMAGES].double()
        few = Visibility(visibility.visible_Bhw[:CHECKED_IMAGES].cpu(), images.device)
        stem, blocks = (net.conv1, net.bn1), net.blocks()
        expected = outcome(lambda *_: encode_tiles(stem, net.small, blocks, images, few), net, ())
        found = outcome(_Pass(net, few.shape, torch.float64), net, (images, *roomy(few)))
        far = largest_difference(found, expected)
        return "" if far <= BOUND else f"in float64 a pass with empty tiles must differ by at most {BOUND:g}; got {far:g}"

    def _captured(self, module: nn.Module, given: Sequence[Tensor]) -> Callable[..., Tensor]:
        if self._pool is None:
            self._pool = self._cuda.graph_pool_handle()
        self._captures = True
        try:
            # Not the batch: a graph that did not read its own memory, or did not write it, would be found out.
            with unmoved(module):
                memory = tuple(torch.zeros_like(t) for t in given)
                graph: Callable[..., Tensor] = self._cuda.make_graphed_callables(module, memory, pool=self._pool)
        finally:
            self._captures = False
        return graph

    def _turn_off(self, cause: str) -> None:
        log.warning("encoder.graphs is not used for the context encoder: %s", cause)
        self._graphs.clear()
        self._is_off = True
