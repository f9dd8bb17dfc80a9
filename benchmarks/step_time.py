"""Cost of a training step: nnU-Net's, a method's in both memory modes, and the passes the method needs run bare.

    python benchmarks/step_time.py -d 901 -c 3d_small
    python benchmarks/step_time.py -d 901 -c 3d_small -tr SimCVDTrainer --profile

All are timed in turn, round by round, on the same plan and batch sizes; the table has medians over the rounds and
ratios, which is what to compare: absolute times are the machine's. With ``--profile`` a second table has the time of
each loss term, forward and backward, and its share of a step.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import add_trainer_arguments, bare_passes, give_unlabeled_batches, labeled_batch, make_trainer, now, where

from nnunet_ssl.evaluation.tables import format_table
from nnunet_ssl.networks.streams import StreamOutput
from nnunet_ssl.trainer.base import SemiSupervisedTrainer


class _Detached(dict[str, StreamOutput]):
    """Outputs whose graph ends at themselves."""

    def peek(self, name: str) -> StreamOutput:
        return self[name].detach()


class LossTerms:
    """All loss terms of a step on outputs that are there already, and the gradients of these outputs.

    Attributes:
        seconds: of each run, by the terms that are computed together.
    """

    def __init__(self, trainer: SemiSupervisedTrainer, batch: dict[str, Any]) -> None:
        self.trainer = trainer
        self.labeled, self.unlabeled = trainer.next_batches(batch)
        self.prepared = trainer.prepare(self.labeled, self.unlabeled)
        streams, images = trainer.streams(), trainer.images(self.labeled, self.unlabeled, self.prepared)
        with torch.no_grad():
            found = trainer.training_network(images, streams, {})
        self.outputs = _Detached({name: _leaves(output.detach()) for name, output in found.items()})
        self.weights = trainer.loss_weights(1.0)
        self.seconds: list[dict[str, float]] = []

    def __call__(self) -> None:
        """One run."""
        spent: dict[str, float] = {}
        start = now(self.trainer.device)
        batches = self.labeled, self.unlabeled, self.prepared
        for part in self.trainer.loss_terms(self.outputs, *batches):  # type: ignore[arg-type]
            torch.stack([self.weights[name] * value for name, value in part.items()]).sum().backward()
            end, name = now(self.trainer.device), " + ".join(part)
            spent[name] = spent.get(name, 0.0) + end - start
            start = end
        self.seconds.append(spent)


def _leaves(output: StreamOutput) -> StreamOutput:
    logits = output.logits if isinstance(output.logits, list) else [output.logits]
    for tensor in (*logits, output.features, output.bottleneck, *(output.head or {}).values()):
        if tensor is not None:
            tensor.requires_grad_()
    return output


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_trainer_arguments(parser)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--profile", action="store_true", help="also the time of each loss term")
    parser.add_argument("--checkpointing", action="store_true", help="also with activation checkpointing")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder)
        supervised = make_trainer(args, "nnUNetTrainer", results)
        batch = labeled_batch(supervised)
        runs: dict[str, Callable[[], object]] = {"nnUNetTrainer": lambda: supervised.train_step(batch)}
        methods = {mode: make_trainer(args, args.tr, results, memory_mode=mode) for mode in ("split", "stacked")}
        if args.checkpointing:
            for mode in ("split", "stacked"):
                options: dict[str, Any] = {"memory_mode": mode, "activation_checkpointing": True}
                methods[f"{mode}, checkpointing"] = make_trainer(args, args.tr, results, **options)
        for mode, method in methods.items():
            give_unlabeled_batches(method)
            own = labeled_batch(method)
            runs[f"{args.tr}, {mode}"] = functools.partial(method.train_step, own)
        bare = dict(bare_passes(methods["split"], stacked=stacked) for stacked in (False, True))
        runs |= bare
        if args.profile:
            terms = LossTerms(methods["split"], labeled_batch(methods["split"]))
            runs["loss terms alone"] = terms
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for round_ in range(args.rounds + 1):
            for name, run in runs.items():
                start = now(supervised.device)
                run()
                if round_:  # the first round warms up
                    seconds[name].append(now(supervised.device) - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    fastest_bare = min(medians[name] for name in bare)
    rows = [
        [name, f"{value:.3f}", f"{value / medians['nnUNetTrainer']:.2f}", f"{value / fastest_bare:.2f}"]
        for name, value in medians.items()
    ]
    print(f"\n{where()}\n{args.c}, batch size {supervised.batch_size}, median of {args.rounds} rounds\n")
    print(format_table(["step", "seconds", "x nnUNetTrainer", "x bare passes"], rows, style="markdown"))
    if args.profile:
        step = min(medians[f"{args.tr}, {mode}"] for mode in methods)
        profile = {name: statistics.median(run[name] for run in terms.seconds[1:]) for name in terms.seconds[0]}
        profile["all"] = medians["loss terms alone"]
        shares = [[name, f"{1000 * value:.1f}", f"{value / step:.1%}"] for name, value in profile.items()]
        print("\nLoss terms, forward and backward, against the faster step\n")
        print(format_table(["terms computed together", "milliseconds", "share of the step"], shares, style="markdown"))


if __name__ == "__main__":
    main()
