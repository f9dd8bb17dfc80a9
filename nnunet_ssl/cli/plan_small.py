"""``nnunet-ssl plan-small``: a configuration for computers without a GPU."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from typing import Any

from nnunet_ssl.cli.lookup import RECOMMENDED, dataset_name, listing, nnunet_folder, plan_again, read_plans
from nnunet_ssl.errors import UserError
from nnunet_ssl.text import by_axis, dataset_number, did_you_mean

HELP = "add a small configuration to the plans, which a computer without a GPU can train"

_EXPLANATION = """\
The small configuration inherits from the given one and uses the same preprocessed data. It has at most 4 stages, with
8, 16, 32 and 64 channels. Its patch has the proportions of the parent's, and at most 32 x 32 x 32 voxels in 3D and
128 x 128 pixels in 2D. Its batch has at most 2 patches in 3D and 12 in 2D.

It is for trying things out. A training with the parent is more accurate.

nnunet-ssl benchmark --configurations refuses plans that have another configuration of the same name. To use both,
choose another name with --name.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``nnunet-ssl plan-small``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EXPLANATION
    parser.add_argument("-d", required=True, metavar="DATASET", help="dataset's number or name")
    parser.add_argument(
        "-c", metavar="CONFIGURATION", default="3d_fullres", help="configuration to inherit from (default: %(default)s)"
    )
    parser.add_argument("-p", metavar="PLANS", default="nnUNetPlans", help="plans identifier (default: %(default)s)")
    parser.add_argument("--name", metavar="NAME", help="of the new configuration (default: 3d_small or 2d_small)")


def run(args: argparse.Namespace) -> int:
    """Add the configuration, and print it and what comes next."""
    if args.name is not None and (not re.fullmatch(r"\w[\w.-]*", args.name, re.ASCII) or "__" in args.name):
        raise UserError(f"--name is {args.name!r}; use letters, digits, '.', '-' and single '_', such as 3d_small.")
    preprocessed = nnunet_folder("nnUNet_preprocessed", "nnU-Net stores plans there.") / dataset_name(args.d)
    plans = read_plans(preprocessed, args.p, args.d)
    parent = _parent(plans, args)

    from nnunet_ssl.data.small_plan import small_configuration
    from nnunet_ssl.files import write_text

    added = small_configuration(args.c, parent)
    name = args.name or f"{len(added['patch_size'])}d_small"
    file = preprocessed / f"{args.p}.json"
    there = plans["configurations"].get(name)
    if there is None:
        plans["configurations"][name] = added
        write_text(file, json.dumps(plans, indent=4) + "\n")
        print(f"Added {name} to {file}. It uses the preprocessed data of {args.c}.")
    elif there == added:
        print(f"{file} has this {name} already; nothing has changed.")
    else:
        raise UserError(f"{file} has another configuration of the name {name}. Choose another name with --name.")
    _print_both(args.c, parent, name, added)
    _print_next(args, name, ready=(preprocessed / parent["data_identifier"]).is_dir())
    return 0


def _parent(plans: dict[str, Any], args: argparse.Namespace) -> Mapping[str, Any]:
    """The configuration to inherit from, resolved.

    Raises:
        UserError: there is none, or no small one can be made of it.
    """
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from nnunet_ssl.networks.architectures import SUPPORTED, unsupported

    names = list(plans["configurations"])
    if args.c not in names:
        there = listing("configurations there", names)
        raise UserError(
            f"The plans {args.p} have no configuration {args.c}; {there}{did_you_mean([args.c], names)} Choose with -c."
        )
    try:
        configuration = PlansManager(plans).get_configuration(args.c)
        network = configuration.network_arch_class_name.rsplit(".", 1)[-1]
        parent: Mapping[str, Any] = configuration.configuration
        # What nnU-Net itself needs of a configuration.
        [parent[key] for key in ("data_identifier", "patch_size", "batch_size")]
    except (KeyError, ValueError, RuntimeError, RecursionError) as error:
        raise UserError(f"Configuration {args.c} cannot be read ({error}). {plan_again(args.d)}") from None
    if parent.get("previous_stage"):
        raise UserError(
            f"{args.c} is the second stage of a cascade, which needs a trained first stage. Choose the configuration "
            "of a single stage with -c, such as 3d_fullres."
        )
    if network not in SUPPORTED:
        raise unsupported(network)
    return parent


def _print_both(parent_name: str, parent: Mapping[str, Any], name: str, added: Mapping[str, Any]) -> None:
    from nnunet_ssl.evaluation.tables import format_table

    def channels(configuration: Mapping[str, Any]) -> str:
        return " ".join(map(str, configuration["architecture"]["arch_kwargs"]["features_per_stage"]))

    both = (parent, added)
    rows = [
        ["patch", *(by_axis(one["patch_size"]) for one in both)],
        ["patches in a batch", *(str(one["batch_size"]) for one in both)],
        ["channels of the stages", *map(channels, both)],
    ]
    print(f"\n{format_table(['', parent_name, name], rows)}\n")
    print(
        f"{name} is for trying things out: it is less accurate than {parent_name}. Compare only trainings of the same "
        "configuration."
    )


def _print_next(args: argparse.Namespace, name: str, *, ready: bool) -> None:
    plans = "" if args.p == "nnUNetPlans" else f" -p {args.p}"
    print("Next:")
    if not ready:
        plans_name = "" if args.p == "nnUNetPlans" else f" -plans_name {args.p}"
        print(f"  nnUNetv2_preprocess -d {dataset_number(args.d)} -c {args.c}{plans_name}")
    for trainer in ("nnUNetTrainer", RECOMMENDED):
        print(f"  nnUNetv2_train {args.d} {name} 0{plans} -tr {trainer}_10epochs -device cpu")
