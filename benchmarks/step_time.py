"""Cost of a training step: nnU-Net's, a method's in both memory modes, and the passes the method needs run bare.

    python benchmarks/step_time.py -d 901 -c 3d_small                        # every trainer
    python benchmarks/step_time.py -d 901 -c 3d_small -tr SimCVDTrainer --profile

All are timed in turn, round by round, on the same plan and batch sizes; the table has medians over the rounds and
ratios, which is what to compare: absolute times are the machine's. A method with stages is in the one with the most
streams. With ``--profile`` another table has the time of each loss term, forward and backward, and its share of a
step. ``--save`` keeps the ratios for ``nnunet-ssl methods``.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path
from time import process_time
from typing import Any

import torch
from common import (
    add_trainer_arguments,
    give_unlabeled_batches,
    in_largest_stage,
    labeled_batch,
    make_trainer,
    now,
    save_costs,
    where,
)
from passes import bare_passes

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


class Runs:
    """What is timed for one trainer.

    Attributes:
        steps: by memory mode.
        bare: its passes, in words.
        terms: its loss terms alone, where they are asked for.
    """

    def __init__(self, args: argparse.Namespace, name: str, results: Path) -> None:
        self.name = name
        self.steps: dict[str, Callable[[], object]] = {}
        for checkpointing in (False, True)[: 1 + args.checkpointing]:
            for mode in ("split", "stacked"):
                settings: dict[str, Any] = {"memory_mode": mode, "activation_checkpointing": checkpointing}
                made = make_trainer(args, name, results, **settings)
                assert isinstance(made, SemiSupervisedTrainer)
                trainer = in_largest_stage(made)
                give_unlabeled_batches(trainer)
                batch = labeled_batch(trainer)
                step = functools.partial(trainer.train_step, batch)
                self.steps[f"{mode}, checkpointing" if checkpointing else mode] = step
                if mode == "split" and not checkpointing:
                    bare = [bare_passes(trainer, batch, stacked=stacked) for stacked in (False, True)]
                    self.bare: dict[str, Callable[[], object]] = dict(bare)
                    self.terms = LossTerms(trainer, batch) if args.profile else None

    @property
    def all(self) -> dict[str, Callable[[], object]]:
        """By what the table calls them."""
        runs = {**self.steps, **self.bare}
        if self.terms is not None:
            runs["loss terms alone"] = self.terms
        return {f"{self.name}, {what}": run for what, run in runs.items()}

    def fastest_bare(self, medians: dict[str, float]) -> float:
        """Seconds of the passes."""
        return min(medians[f"{self.name}, {what}"] for what in self.bare)

    def profile(self, medians: dict[str, float]) -> str:
        """The table of loss terms."""
        assert self.terms is not None
        step = min(medians[f"{self.name}, {mode}"] for mode in self.steps)
        seconds = self.terms.seconds
        profile = {name: statistics.median(run[name] for run in seconds[1:]) for name in seconds[0]}
        profile["all"] = medians[f"{self.name}, loss terms alone"]
        rows = [[name, f"{1000 * value:.1f}", f"{value / step:.1%}"] for name, value in profile.items()]
        return format_table(["terms computed together", "milliseconds", "share of the step"], rows, style="markdown")


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_trainer_arguments(parser)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--profile", action="store_true", help="also the time of each loss term")
    parser.add_argument("--checkpointing", action="store_true", help="also with activation checkpointing")
    parser.add_argument(
        "--cpu-seconds", action="store_true", help="count those of the CPU, where others use the machine too"
    )
    parser.add_argument("--save", action="store_true", help="keep the ratios for nnunet-ssl methods")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder)
        supervised = make_trainer(args, "nnUNetTrainer", results)
        methods = [Runs(args, name, results) for name in args.tr]
        runs: dict[str, Callable[[], object]] = {
            "nnUNetTrainer": functools.partial(supervised.train_step, labeled_batch(supervised))
        }
        for method in methods:
            runs |= method.all
        clock = process_time if args.cpu_seconds else functools.partial(now, supervised.device)
        medians = in_turn(runs, args.rounds, clock)
    base = medians["nnUNetTrainer"]
    rows = [["nnUNetTrainer", f"{base:.3f}", "1.00", ""]]
    for method in methods:
        bare = method.fastest_bare(medians)
        rows += [
            [name, f"{medians[name]:.3f}", f"{medians[name] / base:.2f}", f"{medians[name] / bare:.2f}"]
            for name in method.all
        ]
    head = f"{args.c}, batch size {supervised.batch_size}, median of {args.rounds} rounds"
    if args.cpu_seconds:
        head += " of the CPU's seconds"
    print(f"\n{where()}\n{head}\n")
    print(format_table(["step", "seconds", "x nnUNetTrainer", "x bare passes"], rows, style="markdown"))
    for method in methods if args.profile else []:
        print(f"\nLoss terms of {method.name}, forward and backward, against the faster step\n")
        print(method.profile(medians))
    if args.save:
        ratios = {
            method.name: {mode: medians[f"{method.name}, {mode}"] / base for mode in ("split", "stacked")}
            for method in methods
        }
        save_costs("step", ratios, f"{date.today()}, {head}; {where()}")


def in_turn(runs: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median seconds of each; all run once in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 1):
        for name, run in runs.items():
            start = clock()
            run()
            if round_:  # the first round warms up
                seconds[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


if __name__ == "__main__":
    main()
