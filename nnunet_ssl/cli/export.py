"""``nnunet-ssl export``: a trained model for machines that have nnU-Net alone."""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_ssl.cli.lookup import check_fold_name, find_trainer, model_name, trained_model
from nnunet_ssl.data.nnunet_files import read_dataset_json, read_plans
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import ELSEWHERE, cannot_write, replacing
from nnunet_ssl.settings import PLANS_KEY

if TYPE_CHECKING:
    from torch import nn

HELP = "make a model that predicts where only nnU-Net is installed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``nnunet-ssl export``."""
    parser.add_argument("-d", required=True, metavar="DATASET", help="dataset's number or name")
    parser.add_argument("-c", required=True, metavar="CONFIGURATION", help="configuration, such as 3d_fullres")
    parser.add_argument("-p", metavar="PLANS", default="nnUNetPlans", help="plans identifier (default: %(default)s)")
    parser.add_argument("-tr", required=True, metavar="TRAINER", help="the trainer that trained the model")
    parser.add_argument(
        "-f",
        nargs="+",
        metavar="FOLD",
        default=["0", "1", "2", "3", "4"],
        help="folds, numbers or 'all' (default: 0 1 2 3 4)",
    )
    parser.add_argument(
        "-o",
        required=True,
        metavar="OUTPUT",
        help="FILE.zip for nnUNetv2_install_pretrained_model_from_zip, or a folder that is empty or does not exist yet",
    )
    parser.add_argument(
        "--weights",
        choices=("student", "teacher"),
        help="whose weights, if the method trains both (default: those with which the checkpoint predicts)",
    )
    parser.add_argument(
        "-chk", metavar="CHECKPOINT", default="checkpoint_final.pth", help="checkpoint (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Write the model and print the commands for the other machine."""
    for fold in args.f:
        check_fold_name(fold)
    if Path(args.chk).name != args.chk:
        raise UserError(f"-chk is {args.chk!r}; it must be the name of a file in the folds' folders.")
    output = Path(args.o)
    if output.exists() and (not output.is_dir() or _is_zip(output) or any(output.iterdir())):
        raise UserError(f"{output} exists already: move it away, or choose another name with -o.")
    model = trained_model(args.d, args.tr, args.p, args.c)
    checkpoints = {fold: _checkpoint_file(model, fold, args.chk) for fold in args.f}
    trainer = find_trainer(args.tr)
    if not hasattr(trainer, "settings_class"):
        raise _no_semi_supervised_trainer(args)
    exported = Path(model.parent.name, model_name(_stock_name(trainer), args.p, args.c))

    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        # Next to the output, so that the rename stays within one file system.
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as temporary:
            root = Path(temporary, "model")
            (root / exported).mkdir(parents=True)
            notes = _write_model(root / exported, model, checkpoints, trainer, args)
            if _is_zip(output):
                with replacing(output, aside=Path(temporary, "model.zip")) as archive:
                    _pack(root, archive)
            else:
                if output.is_dir():
                    output.rmdir()
                root.rename(output)
    except OSError as error:
        raise cannot_write(output, error, ELSEWHERE) from error
    print(f"Wrote {output}: {args.tr}, {args.c}, fold {', '.join(checkpoints)}")
    print("\n".join([*notes, "On the other machine:", *_commands(output, exported, checkpoints, args)]))
    return 0


def _is_zip(output: Path) -> bool:
    return output.suffix.lower() == ".zip"


# Where things are


def _checkpoint_file(model: Path, fold: str, name: str) -> Path:
    file = model / f"fold_{fold}" / name
    if not file.is_file():
        there = []
        for folder in sorted(model.glob("fold_*")):
            names = ", ".join(sorted(one.name for one in folder.glob("checkpoint_*.pth")))
            there.append(f"{folder.name} ({names or 'no checkpoint'})")
        raise UserError(
            f"There is no {file}. Folds there: {', '.join(there) or 'none'}. Choose folds with -f and the checkpoint "
            "with -chk, or finish the training."
        )
    return file


def _no_semi_supervised_trainer(args: argparse.Namespace) -> UserError:
    return UserError(
        f"{args.tr} is not a semi-supervised trainer. nnU-Net itself exports its model: nnUNetv2_export_model_to_zip "
        f"-d {args.d} -c {args.c} -p {args.p} -tr {args.tr} -f {' '.join(args.f)} -chk {args.chk} -o FILE.zip"
    )


def _stock_name(trainer: type[Any]) -> str:
    """The trainer of nnU-Net that builds the same network, which is all that prediction asks of a trainer."""
    builder = next(base for base in trainer.__mro__ if "build_network_architecture" in vars(base))
    if builder.__module__.split(".")[0] != "nnunetv2":
        raise UserError(
            f"{trainer.__name__} builds its own network (build_network_architecture of {builder.__name__}), which "
            "nnU-Net alone cannot build. Predict where that trainer is installed."
        )
    return builder.__name__


# What is written


def _write_model(
    target: Path,
    model: Path,
    checkpoints: Mapping[str, Path],
    trainer: type[Any],
    args: argparse.Namespace,
) -> list[str]:
    """Fill the model's folder; returns what the user should know about it."""
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from nnunet_ssl.networks.architectures import check_architecture
    from nnunet_ssl.networks.checkpoints import write_checkpoint

    otherwise = "nnU-Net writes it when a training starts: train, or copy it from another fold's training."
    plans = _without_settings(read_plans(model / "plans.json", otherwise=otherwise))
    dataset_json = read_dataset_json(model / "dataset.json", otherwise=otherwise)
    (target / "plans.json").write_text(json.dumps(plans, indent=4), encoding="utf-8")
    _copy(model, target, "dataset.json", "dataset_fingerprint.json")

    manager = PlansManager(plans)
    configuration = manager.get_configuration(args.c)
    channels = determine_num_input_channels(manager, configuration, dataset_json)
    heads = manager.get_label_manager(dataset_json).num_segmentation_heads
    check_architecture(configuration)
    notes, as_validated = [], args.chk == "checkpoint_final.pth"
    for fold, file in checkpoints.items():
        network = trainer.build_network_architecture(manager, configuration, channels, heads, False)
        exported, weights, choices = _exported_checkpoint(file, network, trainer, args)
        (target / f"fold_{fold}").mkdir()
        write_checkpoint(exported, target / f"fold_{fold}" / args.chk)
        if len(choices) > 1:
            notes.append(f"Fold {fold}: the {weights}'s weights")
        as_validated &= weights == choices[0]
    if as_validated:
        # nnU-Net chose the postprocessing on what the same networks predicted in the folds' validation.
        crossval = f"crossval_results_folds_{'_'.join(checkpoints)}"
        _copy(model, target, f"{crossval}/postprocessing.pkl", f"{crossval}/postprocessing.json")
    if configuration.previous_stage_name is not None:
        notes.append(
            f"{args.c} refines what {configuration.previous_stage_name} predicts: export that model as well, and give "
            "its predictions to the command below with -prev_stage_predictions"
        )
    return notes


def _exported_checkpoint(
    file: Path, network: nn.Module, trainer: type[Any], args: argparse.Namespace
) -> tuple[dict[str, Any], str, tuple[str, ...]]:
    """What nnU-Net reads of a checkpoint, whose weights they are, and whose there are; fills ``network`` with them."""
    from nnunet_ssl.networks.checkpoints import NotPlainError, differences, networks_in, read_checkpoint, stock_weights
    from nnunet_ssl.trainer.checkpoint import CHECKPOINT_KEY

    try:
        checkpoint = read_checkpoint(file)
    except NotPlainError as error:
        raise UserError(
            f"{error} Models of nnU-Net's own trainers are exported by nnU-Net: nnUNetv2_export_model_to_zip."
        ) from None
    if CHECKPOINT_KEY not in checkpoint:
        raise _no_semi_supervised_trainer(args)
    training_state = checkpoint[CHECKPOINT_KEY].get("network", {})
    choices = networks_in(training_state)
    weights = args.weights or choices[0]
    if weights not in choices:
        raise UserError(f"{args.tr} has no {weights}: {file} contains only the {choices[0]}'s weights. Omit --weights.")
    if unlike := differences(checkpoint["network_weights"], network.state_dict()):
        raise UserError(
            f"The weights in {file} do not fit the network of the plans.json next to its folder: "
            f"{'; '.join(unlike)}. Restore the plans.json and the dataset.json with which this fold was trained."
        )
    state = stock_weights(network, checkpoint["network_weights"], training_state, weights=weights)
    init_args = checkpoint["init_args"]
    exported = {
        "network_weights": state,
        "trainer_name": _stock_name(trainer),
        "init_args": {**init_args, "plans": _without_settings(init_args["plans"]), "device": "cpu"},
        "inference_allowed_mirroring_axes": checkpoint["inference_allowed_mirroring_axes"],
    }
    return exported, weights, choices


def _copy(source: Path, target: Path, *names: str) -> None:
    """Copy those files that are there."""
    for name in names:
        if (source / name).is_file():
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, target / name)


def _without_settings(plans: dict[str, Any]) -> dict[str, Any]:
    """The plans without what only this package's trainers read."""
    plans = copy.deepcopy(plans)
    for configuration in plans["configurations"].values():
        configuration.pop(PLANS_KEY, None)
    return plans


def _pack(folder: Path, file: Path) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for member in sorted(folder.rglob("*")):
            if member.is_file():
                archive.write(member, member.relative_to(folder).as_posix())


def _commands(output: Path, exported: Path, folds: Iterable[str], args: argparse.Namespace) -> list[str]:
    """What to type on the other machine."""
    options = f"-i IN -o OUT -f {' '.join(folds)}"
    if args.chk != "checkpoint_final.pth":
        options += f" -chk {args.chk}"
    if not _is_zip(output):
        return [f"  nnUNetv2_predict_from_modelfolder -m {(output.name / exported).as_posix()} {options}"]
    trainer = exported.name.split("__")[0]
    return [
        f"  nnUNetv2_install_pretrained_model_from_zip {output.name}",
        f"  nnUNetv2_predict -d {exported.parent} -c {args.c} -p {args.p} -tr {trainer} {options}",
        f"Installing it replaces an existing {exported.as_posix()}.",
    ]
