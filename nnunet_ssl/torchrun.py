"""``nnUNetv2_train`` in processes that ``torchrun`` starts, on one machine or several.

    torchrun --nnodes 2 --nproc-per-node 4 --node-rank 0 --master-addr HOST -m nnunet_ssl.torchrun \
        901 3d_fullres 0 -tr UniMatchTrainer

The arguments are those of ``nnUNetv2_train``, which itself starts processes on one machine only. ``-num_gpus`` is left
out: torchrun's ``--nproc-per-node`` says it. With ``-device cpu`` the processes share the machine's cores.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from itertools import pairwise

from nnunet_ssl.errors import UserError
from nnunet_ssl.trainer_lookup import RECOMMENDED

_FROM_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def check_call(arguments: Sequence[str]) -> None:
    """Whether this process was started as one of several, with arguments that fit.

    Raises:
        UserError: by whom, or with which option it was not.
    """
    missing = [name for name in _FROM_TORCHRUN if name not in os.environ]
    if missing:
        raise UserError(
            f"nnunet_ssl.torchrun runs in processes that torchrun starts, and {', '.join(missing)} is not set: "
            f"torchrun --nproc-per-node 2 -m nnunet_ssl.torchrun DATASET CONFIGURATION FOLD -tr {RECOMMENDED}. "
            "For one process, or several GPUs of one machine, use nnUNetv2_train."
        )
    if any(argument.split("=")[0] == "-num_gpus" for argument in arguments):
        raise UserError("-num_gpus is for nnUNetv2_train; here torchrun's --nproc-per-node says how many there are.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Join the other processes and do as ``nnUNetv2_train`` does."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        check_call(arguments)
    except UserError as error:
        sys.exit(f"nnunet_ssl.torchrun: error: {error}")

    import torch
    from nnunetv2.run.run_training import run_training_entry
    from torch import distributed as dist

    on_gpu = _option(arguments, "-device", default="cuda") == "cuda"
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    sys.argv = ["nnUNetv2_train", *arguments]
    try:
        run_training_entry()
    finally:
        dist.destroy_process_group()


def _option(arguments: Sequence[str], name: str, *, default: str) -> str:
    # The last one counts, as for argparse.
    values = [argument.split("=", 1)[1] for argument in arguments if argument.startswith(f"{name}=")]
    values += [value for option, value in pairwise(arguments) if option == name]
    return values[-1] if values else default


if __name__ == "__main__":
    main()
