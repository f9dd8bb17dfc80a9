"""Run by torchrun in two processes: steps of TwoNetworks in both of its stages; each rank writes what came of it.

torchrun ... author_steps.py RESULTS
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch
from author_methods import TwoNetworks
from torch import distributed as dist

from nnunet_ssl.networks import passes as passes_module
from nnunet_ssl.testing import make_batches, stages_of, tiny_trainers


def tensors_of(trainer) -> dict:
    network = trainer.training_network
    return {n: t.detach().clone() for n, t in [*network.named_parameters(), *network.named_buffers()]}


def half_batch(trainer, rank: int) -> dict:
    """A rank's own sample of the labeled ones, and its own unlabeled ones."""
    _, unlabeled, batch = make_batches(trainer, u=2, seed=rank)
    trainer.dataloader_unlabeled = itertools.repeat(unlabeled._asdict())
    return {**batch, "data": batch["data"][:1], "target": [t[:1] for t in batch["target"]], "keys": batch["keys"][:1]}


def out_of_memory(self) -> None:
    raise RuntimeError("GET was unable to find an engine to execute this computation")


def main(results: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    report: dict[str, dict] = {}
    with tiny_trainers(TwoNetworks, dim=2) as make:
        for mode in ("stacked", "split"):
            trainer = make()
            batch = half_batch(trainer, rank)
            before = tensors_of(trainer)
            trainer.step_gradients.memory_mode = mode
            for _ in stages_of(trainer):
                for _ in range(2):
                    trainer.train_step(batch)
            report[mode] = {
                "before": before,
                "after": tensors_of(trainer),
                "mode": trainer.step_gradients.memory_mode,
                "images": float(batch["data"].sum()),
            }

        # The second stage's streams are too many for one rank.
        trainer = make()
        batch = half_batch(trainer, rank)
        trainer.step_gradients.memory_mode = "stacked"
        trainer.num_epochs = 10
        modes = []
        for epoch in (0, 1, 5, 6):
            trainer.current_epoch = epoch
            with pytest.MonkeyPatch.context() as context:
                if rank == 1 and epoch == 5:
                    context.setattr(passes_module.StackedOutputs, "finish", out_of_memory)
                trainer.train_step(batch)
            modes.append(trainer.step_gradients.memory_mode)
        report["out of memory"] = {"modes": modes, "after": tensors_of(trainer)}
    torch.save(report, results / f"rank_{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
