"""Run by torchrun in two processes: steps of methods on halves of a batch; each rank writes what came of it.

torchrun ... distributed_steps.py PREPROCESSED_2D PREPROCESSED_3D RESULTS

RESULTS/cases.json lists the cases: a trainer's name, a kind of KINDS, and a mode of MODES or OUT_OF_MEMORY.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from method_steps import BY_NAME, gradients_step, make_batches, make_of_table, make_trainer
from torch import Tensor
from torch import distributed as dist

from nnunet_ssl.api import (
    Outputs,
    SemiSupervisedTrainer,
    Stream,
    UNet,
    another_network,
    masked_cross_entropy,
    pseudo_label,
)
from nnunet_ssl.data.labeled_targets import AddTargets
from nnunet_ssl.distributed import alone
from nnunet_ssl.networks import passes as passes_module
from nnunet_ssl.networks.streams import draw_dropout_masks
from nnunet_ssl.networks.training_network import TrainingNetwork
from nnunet_ssl.trainer.batches import LabeledBatch, UnlabeledBatch

KINDS = {"2d": {}, "3d": {}, "2d_regions": {"regions": True}}
MODES = ("stacked", "split")
OUT_OF_MEMORY = "out of memory"
UNLABELED = 4


class CrossTeaching(SemiSupervisedTrainer):
    """Two networks; the second has no loss at lower resolutions, and no stream in every other step."""

    def build_training_network(self, network: UNet) -> TrainingNetwork:
        return TrainingNetwork(network, networks={"b": another_network(network)})

    def streams(self) -> dict[str, Stream]:
        alone = {"x_a": Stream("x", deep_supervision=self.enable_deep_supervision)}
        together = {"x_b": Stream("x", network="b"), "u_a": Stream("u"), "u_b": Stream("u", network="b")}
        return alone if self._steps_in_epoch % 2 else alone | together

    def images(self, labeled: LabeledBatch, unlabeled: UnlabeledBatch, prepared: Any) -> dict[str, Tensor]:
        return {"x": labeled.image, "u": unlabeled.weak}

    def loss_terms(
        self, outputs: Outputs, labeled: LabeledBatch, unlabeled: UnlabeledBatch, prepared: Any
    ) -> Iterator[dict[str, Tensor]]:
        yield {"supervised": self.supervised_loss(outputs["x_a"].logits, labeled.target)}
        if "x_b" in outputs:
            yield {"of_b": masked_cross_entropy(outputs["x_b"].logits, self.label_of(labeled))}
            of_a = pseudo_label(outputs.peek("u_a").logits, regions=False)
            yield {"mutual": masked_cross_entropy(outputs["u_b"].logits, of_a.target)}

    def loss_weights(self, progress: float) -> dict[str, float]:
        return {"supervised": 1.0, "of_b": 1.0, "mutual": 1.0}


METHODS = {name: row.trainer for name, row in BY_NAME.items()} | {"CrossTeaching": CrossTeaching}


def make(method, kind: str, planned, patch, results: Path):
    if method is CrossTeaching:
        return make_trainer(method, planned, patch, results, **KINDS[kind])
    options = BY_NAME[method.__name__].halves | KINDS[kind]
    return make_of_table(method, planned, patch, results, ramp_length=0.0, **options)


def joined_masks(rank: int | None):
    """Dropout masks of the joined batch, and of them the rows of a rank."""

    def draw(network, streams, images):
        ranks = 1 if rank is None else 2
        whole = {name: image.new_empty(ranks * len(image), *image.shape[1:]) for name, image in images.items()}
        torch.manual_seed(3)
        masks = draw_dropout_masks(network.encoder.output_channels, streams, whole)
        if rank is None:
            return masks
        part = {name: _half(len(whole[streams[name].image]), rank) for name in masks}
        return {
            name: type(mask)(
                [None if level is None else level[part[name]] for level in mask.levels],
                None if mask.features is None else mask.features[part[name]],
            )
            for name, mask in masks.items()
        }

    return draw


def _half(count: int, rank: int) -> slice:
    return slice(rank * count // 2, (rank + 1) * count // 2)


def joined_batches(trainer) -> tuple[LabeledBatch, UnlabeledBatch, dict]:
    """Of two labeled and four unlabeled samples, whose partners are of the same half."""
    labeled, unlabeled, batch = make_batches(trainer, u=UNLABELED)
    unlabeled = unlabeled._replace(partner=torch.tensor([1, 0, 3, 2]))
    trainer.dataloader_unlabeled = itertools.repeat(unlabeled._asdict())
    return labeled, unlabeled, batch


def half_batches(trainer, rank: int) -> tuple[LabeledBatch, UnlabeledBatch, dict]:
    """A rank's half of them."""
    labeled, unlabeled, batch = joined_batches(trainer)
    x, u = _half(2, rank), _half(UNLABELED, rank)
    unlabeled = unlabeled._replace(
        weak=unlabeled.weak[u],
        strong=[view[u] for view in unlabeled.strong],
        boxes=[boxes[u] for boxes in unlabeled.boxes],
        augmented=None if unlabeled.augmented is None else unlabeled.augmented[u],
        partner=torch.tensor([1, 0]),
        keys=unlabeled.keys[u],
    )
    halves = {"data": batch["data"][x], "target": [t[x] for t in batch["target"]], "keys": batch["keys"][x]}
    batch = AddTargets(trainer.extra_targets)(**halves)
    weak = trainer.unlabeled_views().weak_labeled
    labeled = LabeledBatch.from_loader(batch, trainer.device, deep_supervision=True, weak=weak)
    trainer.dataloader_unlabeled = itertools.repeat(unlabeled._asdict())
    return labeled, unlabeled, batch


def gradients(trainer, labeled, unlabeled, mode: str) -> tuple[dict, dict]:
    trainer.step_gradients.memory_mode = mode
    terms = gradients_step(trainer, labeled, unlabeled, trainer.loss_weights(0.0))
    found = {n: p.grad.clone() for n, p in trainer.training_network.named_parameters() if p.grad is not None}
    return terms, found


def tensors_of(trainer) -> dict:
    network = trainer.training_network
    return {n: t.detach().clone() for n, t in [*network.named_parameters(), *network.named_buffers()]}


def main(planned_folders: dict[str, Path], results: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    patch = pytest.MonkeyPatch()
    patch.setattr(TrainingNetwork, "draw_dropout_masks", joined_masks(rank))
    planned = {
        dim: SimpleNamespace(
            preprocessed=folder,
            environment={name: str(folder.parent) for name in ("nnUNet_raw", "nnUNet_preprocessed")},
        )
        for dim, folder in planned_folders.items()
    }
    report: dict[tuple, dict] = {}
    for name, kind, mode in json.loads((results / "cases.json").read_text()):
        trainer = make(METHODS[name], kind, planned[kind[:2]], patch, results)
        report[name, kind, mode] = out_of_memory(trainer, rank) if mode == OUT_OF_MEMORY else steps(trainer, rank, mode)
        if mode == OUT_OF_MEMORY:
            what_is_not_finite_stops_both(make(METHODS[name], kind, planned[kind[:2]], patch, results), rank)
    torch.save(report, results / f"rank_{rank}.pt")
    dist.destroy_process_group()


def steps(trainer, rank: int, mode: str) -> dict:
    """Gradients of a rank's half, alone and of both, and two steps."""
    labeled, unlabeled, batch = half_batches(trainer, rank)
    with alone():
        _, own = gradients(trainer, labeled, unlabeled, "stacked")
    terms, found = gradients(trainer, labeled, unlabeled, mode)
    values = [trainer.train_step(batch) for _ in range(2)]
    return {
        "sizes": (int(trainer.batch_size), trainer.unlabeled_patches),
        "loss_weights": [float(weight) for weight in trainer.loss.together.weight_factors],
        "own": own,
        "terms": terms,
        "gradients": found,
        "after": tensors_of(trainer),
        "logged": {name: float(value) for name, value in values[-1].items()},
    }


def out_of_memory(trainer, rank: int) -> dict:
    """The memory of one rank does not suffice for all streams at once: both go on in split mode."""
    _, _, batch = half_batches(trainer, rank)
    trainer.step_gradients.memory_mode = "stacked"
    with pytest.MonkeyPatch.context() as context:
        if rank == 1:
            context.setattr(passes_module.StackedOutputs, "finish", _out_of_memory)
        trainer.train_step(batch)
    trainer.train_step(batch)
    return {"mode": trainer.step_gradients.memory_mode, "after": tensors_of(trainer)}


def what_is_not_finite_stops_both(trainer, rank: int) -> None:
    """What is not finite on one rank stops both."""
    _, unlabeled, batch = half_batches(trainer, rank)
    if rank == 1:
        for view in (unlabeled.weak, unlabeled.augmented):
            if view is not None:
                view[0] = float("nan")
    with pytest.raises(RuntimeError, match="not finite"):
        trainer.train_step(batch)


def _out_of_memory(self) -> None:
    raise RuntimeError("GET was unable to find an engine to execute this computation")


if __name__ == "__main__":
    two_d, three_d, output = map(Path, sys.argv[1:])
    main({"2d": two_d, "3d": three_d}, output)
