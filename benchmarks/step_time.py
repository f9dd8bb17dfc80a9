"""Cost of a training step: nnU-Net's, a method's in both memory modes, and the passes the method needs run bare.

    python benchmarks/step_time.py -d 901 -c 3d_small

All are timed in turn, round by round, on the same plan and batch sizes; the table has medians over the rounds and
ratios, which is what to compare: absolute times are the machine's.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch
from common import add_trainer_arguments, give_unlabeled_batches, labeled_batch, make_trainer, where

from nnunet_ssl.evaluation.tables import format_table


def bare_passes(trainer, images: int, decoder_passes: int, *, stacked: bool) -> Callable[[], None]:
    """Encoder passes of ``images`` batches and ``decoder_passes`` decoder passes, one of them without gradient."""
    network, device = trainer.training_network, trainer.device
    shape = (trainer.batch_size, trainer.num_input_channels, *trainer.configuration_manager.patch_size)
    batches = [torch.randn(shape, device=device) for _ in range(images)]

    def forward(skips):
        return network.decode(skips, deep_supervision=False)

    def autocast():
        return torch.autocast(device.type, enabled=device.type == "cuda")

    def run() -> None:
        network.zero_grad(set_to_none=True)
        if stacked:
            with autocast():
                skips = network.encoder(torch.cat(batches))
                with torch.no_grad():
                    forward([s[: shape[0]] for s in skips])
                rows = torch.arange((decoder_passes - 1) * shape[0], device=device) % len(skips[0])
                loss = forward([s[rows] for s in skips]).float().square().mean()
            loss.backward()
            return
        remaining = decoder_passes - 1
        for index, batch in enumerate(batches):
            with autocast():
                skips = network.encoder(batch)
                leaves = [s.detach().requires_grad_() for s in skips]
                if index == 0:
                    with torch.no_grad():
                        forward(leaves)
            share = remaining // (images - index)
            remaining -= share
            for _ in range(share):
                with autocast():
                    loss = forward(leaves).float().square().mean()
                loss.backward()
            torch.autograd.backward(skips, [leaf.grad for leaf in leaves])

    return run


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_trainer_arguments(parser)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder)
        supervised = make_trainer(args, "nnUNetTrainer", results)
        batch = labeled_batch(supervised)
        runs: dict[str, Callable[[], object]] = {"nnUNetTrainer": lambda: supervised.train_step(batch)}
        method = None
        for mode in ("split", "stacked"):
            method = make_trainer(args, args.tr, results, memory_mode=mode)
            give_unlabeled_batches(method)
            runs[f"{args.tr}, {mode}"] = lambda method=method: method.train_step(batch)
        streams = method.streams()
        images, passes = len({s.image for s in streams.values()}), len(streams)
        for stacked in (False, True):
            name = f"{images} encoder + {passes} decoder passes, {'stacked' if stacked else 'separate'}, bare"
            runs[name] = bare_passes(method, images, passes, stacked=stacked)
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for round_ in range(args.rounds + 1):
            for name, run in runs.items():
                if args.device == "cuda":
                    torch.cuda.synchronize()
                start = perf_counter()
                run()
                if args.device == "cuda":
                    torch.cuda.synchronize()
                if round_:  # the first round warms up
                    seconds[name].append(perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    bare = min(value for name, value in medians.items() if name.endswith("bare"))
    rows = [
        [name, f"{value:.3f}", f"{value / medians['nnUNetTrainer']:.2f}", f"{value / bare:.2f}"]
        for name, value in medians.items()
    ]
    print(f"\n{where()}\n{args.c}, batch size {supervised.batch_size}, median of {args.rounds} rounds\n")
    print(format_table(["step", "seconds", "x nnUNetTrainer", "x bare passes"], rows, markdown=True))


if __name__ == "__main__":
    main()
