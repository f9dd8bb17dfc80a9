"""``nnunet-ssl adapt``: a self-supervised checkpoint of nnssl as weights to start from."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunet_ssl.cli.lookup import RECOMMENDED, dataset_name, nnunet_folder, plan_again, read_plans
from nnunet_ssl.data.nnunet_files import read_dataset_json
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import ELSEWHERE, cannot_write

HELP = "make a self-supervised checkpoint of nnssl fit nnUNetv2_train's -pretrained_weights"

_EXPLANATION = """\
nnUNetv2_train -pretrained_weights wants the whole network. Of a checkpoint of nnssl, encoder and stem are taken, and
the decoder starts with random weights, as in nnU-Net's own fine-tuning of such checkpoints. The plans must ask
for the architecture that was pretrained: for ResEncL, plan with nnUNetv2_plan_experiment -pl nnUNetPlannerResEncL, or
with nnUNetv2_preprocess_like_nnssl of an nnU-Net after 2.8.1. The plans of the latter name the checkpoint, so that -i
is not needed.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``nnunet-ssl adapt``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EXPLANATION
    parser.add_argument("-i", metavar="CHECKPOINT", help="checkpoint of nnssl (default: the one that the plans name)")
    parser.add_argument("-d", required=True, metavar="DATASET", help="dataset to train on: its number or name")
    parser.add_argument("-c", required=True, metavar="CONFIGURATION", help="configuration, such as 3d_fullres")
    parser.add_argument("-p", metavar="PLANS", default="nnUNetPlans", help="plans identifier (default: %(default)s)")
    parser.add_argument("-o", required=True, metavar="FILE", help="file to write; it must not exist yet")


def run(args: argparse.Namespace) -> int:
    """Write the weights and print the command that starts from them."""
    output = Path(args.o)
    if output.exists():
        raise UserError(f"{output} is there already: move it away, or choose another name with -o.")
    preprocessed = nnunet_folder("nnUNet_preprocessed", "nnU-Net keeps the plans there.")

    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from nnunet_ssl.networks.architectures import PRETRAIN_INFO, check_architecture, check_supported
    from nnunet_ssl.networks.checkpoints import (
        NotPlainError,
        read_checkpoint,
        with_pretrained_encoder,
        write_checkpoint,
    )

    dataset = preprocessed / dataset_name(args.d)
    plans = PlansManager(read_plans(dataset, args.p, args.d))
    if args.c not in plans.available_configurations:
        raise UserError(
            f"{args.p} has no configuration {args.c}; it has {', '.join(plans.available_configurations)}. Correct -c."
        )
    source = args.i or _named_by(plans.plans.get(PRETRAIN_INFO), args.p)
    configuration = plans.get_configuration(args.c)
    dataset_json = read_dataset_json(dataset / "dataset.json", otherwise=plan_again(args.d))
    check_architecture(configuration)
    network = get_network_from_plans(
        configuration.network_arch_class_name,
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
        determine_num_input_channels(plans, configuration, dataset_json),
        plans.get_label_manager(dataset_json).num_segmentation_heads,
    )
    try:
        checkpoint = read_checkpoint(Path(source))
    except NotPlainError as error:
        raise UserError(f"{error} A checkpoint of nnU-Net goes to -pretrained_weights as it is.") from None
    try:
        weights = with_pretrained_encoder(check_supported(network), checkpoint)
    except (UserError, NotImplementedError) as error:
        raise UserError(f"{source} cannot be adapted: {error}") from None

    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_checkpoint({"network_weights": weights}, output)
    except OSError as error:
        raise cannot_write(output, error, ELSEWHERE) from error
    print(f"Wrote {output}: encoder and stem of {source}, decoder with random weights")
    for there in checkpoint["nnssl_adaptation_plan"].get("pretrain_plan", {}).get("configurations", {}).values():
        print(f"Pretrained with {_images(there)}; {args.p} {args.c} has {_images(configuration.configuration)}")
    start = f"nnUNetv2_train {dataset.name} {args.c} FOLD -p {args.p} -tr {RECOMMENDED}"
    print(f"Start with: {start} -pretrained_weights {output}")
    return 0


def _named_by(information: Any, plans: str) -> str:
    """The checkpoint that plans of nnUNetv2_preprocess_like_nnssl name."""
    named = information.get("checkpoint_path") if isinstance(information, dict) else None
    if not isinstance(named, str) or not named:
        raise UserError(f"The plans {plans} name no pretrained checkpoint. Name one of nnssl with -i.")
    return named


def _images(configuration: Mapping[str, Any]) -> str:
    normalization = ", ".join(dict.fromkeys(configuration.get("normalization_schemes") or ["unknown normalization"]))
    return f"spacing {configuration.get('spacing')}, {normalization}, patches of {configuration.get('patch_size')}"
