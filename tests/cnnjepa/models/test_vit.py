"""ViTs are timm's, hidden patches cost and tell nothing, and I-JEPA's blocks lie as described."""

import numpy as np
import pytest
import timm
import torch
from torch import nn

from cnnjepa.config import EncoderConfig, EncoderName
from cnnjepa.mask_config import BlockMaskConfig
from cnnjepa.masking import draw_blocks
from cnnjepa.models.vit import BlockPredictor, VisionTransformer, build_vit, sine_positions, take_cells

SMALL = EncoderConfig(EncoderName.vit_tiny, patch_size=8, vit_depth=2)


def vit(seed: int = 0) -> VisionTransformer:
    torch.manual_seed(seed)
    return build_vit(SMALL, 32).double()


def test_features_are_timms_under_timms_keys() -> None:
    ours = vit()
    options = {"img_size": 32, "patch_size": 8, "depth": 2, "num_classes": 0, "class_token": False, "global_pool": "avg", "fc_norm": False}
    theirs = timm.create_model("vit_tiny_patch16_224", **options).double().eval()
    assert theirs.load_state_dict(ours.state_dict(), strict=False) == ([], [])
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(ours(images).flatten(2).transpose(1, 2), theirs.forward_features(images), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "parameters"), [(EncoderName.vit_tiny, 5.5e6), (EncoderName.vit_small, 21.7e6), (EncoderName.vit_base, 85.8e6)]
)
def test_sizes_are_the_known_ones(name: EncoderName, parameters: float) -> None:
    with torch.device("meta"):
        net = build_vit(EncoderConfig(name, patch_size=16), 224)
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(parameters, rel=0.01)


def test_hidden_patches_tell_nothing_and_are_not_computed() -> None:
    net = vit()
    cells = torch.tensor([[0, 3, 5], [1, 2, 15]])
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    shown = torch.zeros(2, 16, dtype=torch.bool).scatter_(1, cells, True).view(2, 4, 4).repeat_interleave(8, 1).repeat_interleave(8, 2)
    others = torch.where(shown[:, None], images, torch.randn_like(images) * 100)
    assert torch.equal(net.tokens(images, cells), net.tokens(others, cells))
    seen: list[int] = []
    for block in net.blocks:
        block.register_forward_hook(lambda _m, given, _o: seen.append(given[0].shape[1]))
    net.tokens(images, cells)
    assert seen == [3, 3]
    torch.testing.assert_close(net.tokens(images, torch.arange(16).expand(2, -1)), net.tokens(images))


def test_positions_tell_every_cell_apart() -> None:
    positions = sine_positions(16, 384)[0]
    assert positions.shape == (256, 384)
    distances = torch.cdist(positions, positions) + 10 * torch.eye(256)
    assert distances.min() > 0.5


def test_each_target_block_is_predicted_by_itself() -> None:
    torch.manual_seed(0)
    predictor = BlockPredictor(4, 192, 48, 2, 3).double()
    context, cells = torch.randn(2, 5, 192, dtype=torch.float64), torch.tensor([[0, 1, 2, 3, 4]] * 2)
    targets = torch.tensor([[[8, 9], [14, 15], [10, 11]], [[5, 6], [12, 13], [7, 8]]])
    together = predictor(context, cells, targets)
    assert together.shape == (2, 3, 2, 192)
    for t in range(3):
        torch.testing.assert_close(together[:, t], predictor(context, cells, targets[:, t : t + 1])[:, 0])
    moved = predictor(context, cells, targets.flip(2))
    torch.testing.assert_close(moved.flip(2), together)  # a prediction goes by the place that is asked for, not by its order


@pytest.mark.parametrize("grid", [3, 4, 7, 14, 16])
def test_blocks_are_whole_and_disjoint_from_their_context(grid: int) -> None:
    config, positions = BlockMaskConfig(), np.arange(24)
    for step in range(60):
        context, targets = draw_blocks(config, grid, 0, step, 24, positions)
        assert context.shape[1] >= max(grid * grid // 8, 1)
        assert targets.shape[:2] == (24, 4)
        for own_context, own_targets in zip(context, targets, strict=True):
            assert len(set(own_context)) == len(own_context)
            assert not set(own_context) & set(own_targets.ravel())
            for block in own_targets:
                rows, columns = np.unique(block // grid), np.unique(block % grid)
                assert len(rows) * len(columns) == len(set(block)) == targets.shape[2]
                assert np.ptp(rows) + 1 == len(rows)
                assert np.ptp(columns) + 1 == len(columns)
        assert context.min() >= 0
        assert max(context.max(), targets.max()) < grid * grid


def test_blocks_reach_every_cell_and_have_the_asked_for_size() -> None:
    config, positions = BlockMaskConfig(), np.arange(32)
    sizes, cells = [], set()
    for step in range(300):
        _, targets = draw_blocks(config, 16, 0, step, 32, positions)
        sizes.append(targets.shape[2])
        cells |= set(targets.ravel())
    assert cells == set(range(256))
    assert 0.9 * 0.15 * 256 < min(sizes) <= max(sizes) < 1.1 * 0.2 * 256
    assert np.mean(sizes) == pytest.approx(0.175 * 256, rel=0.03)


def test_blocks_are_the_same_for_any_split_of_the_global_batch() -> None:
    whole = draw_blocks(BlockMaskConfig(), 14, 3, 5, 32, np.arange(32))
    parts = [draw_blocks(BlockMaskConfig(), 14, 3, 5, 32, np.arange(i, i + 8)) for i in range(0, 32, 8)]
    for i in range(2):
        assert np.array_equal(whole[i], np.concatenate([p[i] for p in parts]))
    assert not np.array_equal(whole[1], draw_blocks(BlockMaskConfig(), 14, 4, 5, 32, np.arange(32))[1])


def test_cells_are_taken_sample_by_sample() -> None:
    x = torch.arange(12.0).view(2, 6, 1)
    assert take_cells(x, torch.tensor([[5, 0], [1, 1]])).flatten().tolist() == [5, 0, 7, 7]


def test_positions_are_sines_and_cosines_of_column_and_row() -> None:
    """As the official code has them: the first half of the features tells the column, the second the row; 10000 is the longest wave."""
    positions = sine_positions(5, 16)[0].view(5, 5, 16)
    for row, column in ((0, 0), (1, 0), (0, 3), (4, 2)):
        expected = []
        for place in (column, row):
            waves = [place / 10000 ** (k / 4) for k in range(4)]
            expected += [np.sin(w) for w in waves] + [np.cos(w) for w in waves]
        np.testing.assert_allclose(positions[row, column].numpy(), expected, atol=1e-6)


def test_weights_start_as_ijepas_for_any_width_and_depth() -> None:
    """A std of .02 at 768 inputs, by the inverse root of the inputs elsewhere; a block's output is less by the root of twice its number."""
    torch.manual_seed(0)
    net = build_vit(EncoderConfig(EncoderName.vit_tiny, patch_size=8, vit_depth=3), 32)
    wide = 0.02 * (768 / 192) ** 0.5
    assert float(net.patch_embed.proj.weight.std()) == pytest.approx(0.02 * (768 / (3 * 8 * 8)) ** 0.5, rel=0.05)
    for number, block in enumerate(net.blocks, start=1):
        assert float(block.attn.qkv.weight.std()) == pytest.approx(wide, rel=0.03)
        assert float(block.mlp.fc1.weight.std()) == pytest.approx(wide, rel=0.03)
        assert float(block.attn.proj.weight.std()) == pytest.approx(wide / (2 * number) ** 0.5, rel=0.03)
        assert float(block.mlp.fc2.weight.std()) == pytest.approx(wide / 2 / (2 * number) ** 0.5, rel=0.03)  # 768 inputs
        assert not block.attn.qkv.bias.any()
    assert float(BlockPredictor(4, 192, 1536, 1, 3).mask_token.std()) == pytest.approx(0.02, rel=0.1)


def test_heads_have_64_features_each() -> None:
    for name in (EncoderName.vit_tiny, EncoderName.vit_small, EncoderName.vit_base):
        with torch.device("meta"):
            net = build_vit(EncoderConfig(name, vit_depth=1), 28)
        assert net.out_channels == 64 * net.heads == 64 * net.blocks[0].attn.num_heads


def test_all_norms_have_the_epsilon_of_vits_whatever_timms_default_is() -> None:
    net, predictor = build_vit(EncoderConfig(EncoderName.vit_tiny, vit_depth=2), 28), BlockPredictor(2, 192, 64, 2, 1)
    norms = [m for part in (net, predictor) for m in part.modules() if isinstance(m, nn.LayerNorm)]
    assert len(norms) == 2 * (2 * 2 + 1)
    assert {m.eps for m in norms} == {1e-6}
