"""Run the probes of a completed run later, on its final checkpoint, without training."""

import time
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from cnnjepa.config import TrainConfig
from cnnjepa.data.datasets import Splits, load_splits
from cnnjepa.data.fingerprint import difference
from cnnjepa.data.skipped import without_listed
from cnnjepa.methods._base import build_method
from cnnjepa.probes import run_probes
from cnnjepa.probes._evaluation import Conditions
from cnnjepa.probes.collapse import collapsed
from cnnjepa.references import references
from cnnjepa.run import checkpoint
from cnnjepa.run.folder import RunFolder
from cnnjepa.run.ranks import broadcast_object, first_of, joined
from cnnjepa.run.scores import Scores


def final_checkpoint(folder: RunFolder) -> checkpoint.Checkpoint:
    """Return the intact checkpoint of the run's last step; raise ValueError if there is none."""
    result, found = folder.result(), checkpoint.newest_good(folder.checkpoints)
    wanted = result.step if result is not None else 0
    if found is None or found.step != wanted:
        got = "none" if found is None else f"one of step {found.step}"
        raise ValueError(f"a run to score must hold an intact checkpoint of its last step, {wanted}; got {got} in {folder.checkpoints}")
    return found


def trained_encoder(config: TrainConfig, found: checkpoint.Checkpoint, device: torch.device) -> nn.Module:
    """Return the network that the probes of a run of `config` judge, with the weights of a checkpoint."""
    method = build_method(config, 1, device)
    method.load_state_dict(checkpoint.read(found, device)["method"])
    encoder: nn.Module = method.probe_encoder
    return encoder


def probe(config: TrainConfig, folder: RunFolder, wanted: Mapping[str, Sequence[str]]) -> Scores:
    """Return the scores of the probes in `wanted`, by data set; "" is the run's own.

    The call is collective over ranks. As many ranks as trained the run give it the same bits. All
    ranks return the same. Raises ValueError if the final checkpoint or the run's images are gone,
    and EvaluationStopped on all ranks if `folder` asks an evaluation to stop.
    """
    torch.set_num_threads(config.threads)
    started = time.perf_counter()
    with joined(config.device) as ranks:
        found: checkpoint.Checkpoint | None = None
        splits: Splits | None = None
        cause = ""
        try:
            found = final_checkpoint(folder) if ranks.is_main else None
            splits = load_splits(config.data)
            cause = difference(splits.dataset, config.data) if ranks.is_main else ""
            splits = without_listed(splits, config.data, folder)
        except ValueError as error:
            cause = str(error)
        if first := first_of(cause, ranks):
            raise ValueError(first)
        found = broadcast_object(found, ranks)
        assert found is not None
        assert splits is not None
        encoder = trained_encoder(config, found, ranks.device)
        conditions = Conditions(folder.path / "evaluations", folder.should_stop)
        outcome = run_probes(encoder, config, splits, ranks, True, wanted, conditions)
        cause = collapsed(outcome.metrics, config.probes)
        scores = Scores(
            outcome.metrics,
            outcome.missing,
            outcome.images,
            references(config, folder, splits, ranks, outcome, wanted, conditions),
            outcome.hours,
            f"CollapsedError: collapsed: {cause}, at epoch {config.epochs}" if cause else "",
        )
        scores.about = {"step": found.step, "checkpoint": found.digest, "ranks": ranks.count, "device": ranks.device.type}
        scores.about["seconds"] = time.perf_counter() - started
        return scores
