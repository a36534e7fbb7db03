"""Any number of ranks is the same experiment: 2 ranks equal 1 with twice the micro-batches, and 4 ranks resume bit for bit."""

import copy
import json
import os
import signal
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from cnnjepa.config import Precision, TrainConfig, method_module
from cnnjepa.distributed import GradientBuckets, RunningStatistics
from cnnjepa.mask_config import MaskStrategy
from cnnjepa.methods.cnn_jepa import Config
from cnnjepa.run import checkpoint
from cnnjepa.run.folder import RunFolder
from cnnjepa.run.identity import to_dict
from cnnjepa.run.ranks import Device, Ranks, is_main_rank, joined, pick_device, rank_count
from tests.support import forked
from tests.support.forked import Forked
from tests.support.runs import CHILD, assert_bitwise_equal, comparable, final_state, wait_until_held
from tests.support.tiny import tiny_config

ASK_ON_RANK_1 = """    import os
    slow.calls = getattr(slow, 'calls', 0) + 1
    return os.environ['RANK'] == '1' and slow.calls == 4"""


class Launched(list[Forked]):
    """Ranks that meet at a store of this process, as torchrun's meet at its agent's: nobody looks for a free port that another may take."""

    def __init__(self, ranks: int, words: list[str], **more: str) -> None:
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.store.port), "OMP_NUM_THREADS": "1"}
        common |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
        for rank in range(ranks):
            environment = {**os.environ, **common, **more, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            self.append(forked.start(words, env=environment, start_new_session=True))


def start(config: TrainConfig, path: Path, ranks: int, child: str = CHILD, **more: str) -> Launched:
    """Ranks as torchrun starts them, less torchrun itself."""
    return Launched(ranks, ["-c", child, str(path), json.dumps(to_dict(config))], **more)


def finish(children: Launched) -> None:
    try:
        assert [c.wait(timeout=300) for c in children] == [0] * len(children)
    finally:
        for child in children:
            child.kill()


def five_steps() -> TrainConfig:
    config = tiny_config(epochs=1, micro_batch_size=8, precision=Precision.fp64)
    config.optimizer.warmup_epochs = 0
    return config


def assert_close(a: dict, b: dict, least: int = 50) -> None:
    """Weights, running statistics and token, more than `least` tensors, to 1e-9 of each tensor's size."""
    assert len(a["method"]) > least
    for key, value in a["method"].items():
        scale = value.double().abs().max().clamp_min(1e-12)
        assert ((value - b["method"][key]).double().abs().max() / scale) < 1e-9, key


@pytest.mark.slow
def test_two_ranks_equal_one_rank_with_twice_the_micro_batches(tmp_path: Path) -> None:
    config = five_steps()
    for ranks in (1, 2, 4):
        finish(start(config, tmp_path / str(ranks), ranks))
    one = final_state(tmp_path / "1")
    assert one["step"] == 5
    for ranks in ("2", "4"):
        assert_close(final_state(tmp_path / ranks), one)
        ours, theirs = (RunFolder(tmp_path / n).result() for n in (ranks, "1"))
        assert ours is not None
        assert theirs is not None
        assert ours.metrics == pytest.approx(theirs.metrics, rel=1e-6)


@pytest.mark.slow
def test_synchronised_batchnorm_equals_one_rank_with_the_whole_batch(tmp_path: Path) -> None:
    """With random masks every sample hides as many cells, so that the mean over each rank's cells is the mean over all."""
    for ranks, micro_batch in ((2, 8), (1, 16)):
        config = five_steps()
        config.global_batch_size, config.micro_batch_size, config.encoder.sync_bn = 16, micro_batch, True
        config.data.train_limit = 80
        assert isinstance(config.method, Config)
        config.method.mask.strategy = MaskStrategy.random
        finish(start(config, tmp_path / str(ranks), ranks))
    assert_close(final_state(tmp_path / "2"), final_state(tmp_path / "1"))


@pytest.mark.slow
def test_evaluations_on_two_ranks_score_as_on_one(tmp_path: Path) -> None:
    """The encoder is untrained, so that it is the same on any number of ranks; the last bits of fine-tuning are not."""
    found = {}
    for ranks in (1, 2):
        config = five_steps()
        config.method = method_module("random").Config()
        config.micro_batch_size = config.global_batch_size // ranks
        config.probes.names = ["few_shot", "label_fraction", "robustness", "finetune"]
        config.probes.few_shot_images, config.probes.robustness_severities, config.probes.robustness_images = [1], [3], 40
        config.probes.finetune_epochs, config.probes.finetune_warmup_epochs, config.probes.finetune_batch_size = 2, 1.0, 16
        finish(start(config, tmp_path / str(ranks), ranks))
        result = RunFolder(tmp_path / str(ranks)).result()
        assert result is not None
        assert result.missing == {}
        found[ranks] = result.metrics
    assert found[1].keys() == found[2].keys()
    for name, value in found[1].items():
        apart = 10.0 if name.startswith("finetune") else 3.0  # of 40 to 60 images, on features that differ in their last bits
        assert value == pytest.approx(found[2][name], abs=apart), name


@pytest.mark.slow
def test_four_ranks_killed_and_resumed_are_bit_for_bit(tmp_path: Path) -> None:
    config = tiny_config(micro_batch_size=8)
    finish(start(config, tmp_path / "undisturbed", 4))
    disturbed = tmp_path / "disturbed"
    for wanted, victims in ((2, 4), (6, 1)):  # all ranks die; the last one dies, and the others, which wait for it, end by themselves
        children = start(config, disturbed, 4, HOLD_AT=str(wanted))
        wait_until_held(disturbed, children)
        for child in children[-victims:]:
            os.kill(child.pid, signal.SIGKILL)
        ends = [c.wait(timeout=120) for c in children]
        assert ends[-victims:] == [-signal.SIGKILL] * victims
        assert 0 not in ends
    finish(start(config, disturbed, 4))
    assert comparable(disturbed) == comparable(tmp_path / "undisturbed")
    assert_bitwise_equal(final_state(disturbed), final_state(tmp_path / "undisturbed"))


def test_ranks_wait_for_each_other_as_long_as_a_probe_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[timedelta] = []

    def refuse(backend: str, timeout: timedelta) -> None:
        reported.append(timeout)
        raise ConnectionError(backend)

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "init_process_group", refuse)
    with pytest.raises(ConnectionError, match="gloo"), joined(Device.cpu):
        pass
    assert reported[0] >= timedelta(hours=1)


def test_running_statistics_of_ranks_are_those_of_one_rank_that_is_fed_all_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """3 ranks of 2 micro-batches each, one after the other in this process: the first time round their messages are only kept."""
    random = torch.Generator().manual_seed(0)
    batches = torch.randn(3, 2, 8, 4, 3, 3, dtype=torch.float64, generator=random)
    first = nn.BatchNorm2d(4, momentum=0.3).double()
    first(3 + torch.randn(8, 4, 3, 3, dtype=torch.float64, generator=random))
    alone = copy.deepcopy(first)
    for batch in batches.flatten(0, 1):
        alone(batch)

    def step(rank: int, all_reduce: Callable[[torch.Tensor], object]) -> nn.BatchNorm2d:
        norm = copy.deepcopy(first)
        statistics = RunningStatistics(norm, Ranks(rank, 3, torch.device("cpu")))
        statistics.start_step()
        for batch in batches[rank]:
            norm(batch)
        monkeypatch.setattr(dist, "all_reduce", all_reduce)
        statistics.end_step()
        return norm

    messages: list[torch.Tensor] = []
    for rank in range(3):
        step(rank, lambda message: messages.append(message.clone()))
    for rank in range(3):
        norm = step(rank, lambda message: message.copy_(sum(messages)))
        for name, buffer in norm.named_buffers():
            torch.testing.assert_close(buffer, alone.get_buffer(name), rtol=1e-12, atol=1e-12)
        assert norm.num_batches_tracked == 7


def test_one_rank_asked_to_stop_stops_all_at_the_same_step(tmp_path: Path) -> None:
    config = tiny_config(micro_batch_size=8)
    finish(start(config, tmp_path, 2, CHILD.replace("    return False", ASK_ON_RANK_1)))
    assert RunFolder(tmp_path).result() is None
    assert checkpoint.find(tmp_path / "checkpoints")[0].step == 4


def test_gradients_leave_in_the_order_of_their_buckets_while_the_backward_pass_goes_on(tmp_path: Path) -> None:
    """A group of one process that believes in two ranks: each sum is its own value, so each mean is half of it."""
    layers = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))).double()
    x = torch.randn(3, 8, dtype=torch.float64)
    layers(x).square().sum().backward()
    expected = [p.grad.clone() for p in layers.parameters() if p.grad is not None]
    layers.zero_grad()
    sent: list[int] = []
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        buckets = GradientBuckets(list(layers.parameters()), Ranks(0, 2, torch.device("cpu")), megabytes=0.0005)
        layers[0].weight.register_post_accumulate_grad_hook(lambda _: sent.append(buckets._next))
        layers(x).square().sum().backward()  # not the step's last: nothing leaves
        assert sent == [0]
        layers.zero_grad()
        buckets.arm()
        layers(x).square().sum().backward()
        assert sent[1] > 0
        assert len(buckets._buckets) == buckets._next == 4
        assert buckets.finish(torch.tensor([4.0, 6.0])).tolist() == [2, 3]
        for parameter, gradient in zip(layers.parameters(), expected, strict=True):
            assert torch.equal(parameter.grad, gradient / 2)
        buckets.arm()
        with pytest.raises(AssertionError, match="without `arm`"):
            buckets.finish(torch.zeros(1))
    finally:
        dist.destroy_process_group()


def test_each_rank_takes_the_device_of_its_place_on_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for local, devices, index in (("0", 4, 0), ("3", 4, 3), ("3", 1, 0), ("5", 4, 1)):  # one visible device a rank leaves only index 0
        monkeypatch.setenv("LOCAL_RANK", local)
        monkeypatch.setattr(torch.cuda, "device_count", lambda devices=devices: devices)
        assert pick_device(Device.auto) == pick_device(Device.cuda) == torch.device("cuda", index)
    assert pick_device(Device.cpu) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device(Device.auto) == torch.device("cpu")
    with pytest.raises(ValueError, match="device must be cpu or auto where torch sees no CUDA device; got cuda"):
        pick_device(Device.cuda)


def test_the_launchers_variables_say_how_many_ranks_there_are_and_which_is_the_main_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    assert (rank_count(), is_main_rank()) == (1, True)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    assert (rank_count(), is_main_rank()) == (4, False)
    for wrong in ("0", "-1", "two", ""):
        monkeypatch.setenv("WORLD_SIZE", wrong)
        with pytest.raises(ValueError, match="WORLD_SIZE must be the number of ranks"):
            rank_count()
