"""Checks that hold for every method: for the tests of a method in this package or in another one.

:func:`check_method` is all that a method's tests need of this module; it takes a minute on a CPU, needs no data set and
runs no command of nnU-Net. The checks that it makes are also there one by one, for trainers that were made elsewhere.

>>> from nnunet_ssl.methods.crossmatch import CrossMatchTrainer
>>> check_method(CrossMatchTrainer, confidence_threshold=0.4)  # doctest: +SKIP
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor

from nnunet_ssl.data.labeled_targets import AddTargets
from nnunet_ssl.networks.training_network import TrainingNetwork
from nnunet_ssl.trainer.base import SemiSupervisedTrainer
from nnunet_ssl.trainer.batches import LabeledBatch, UnlabeledBatch
from nnunet_ssl.trainer.gradients import MemoryMode
from nnunet_ssl.trainer.memory import Mode, step_bytes, trainer_of_plans

CONFIGURATION = "tiny"
"""The configuration of :func:`tiny_plans`."""

LABELS: dict[str, dict[str, Any]] = {
    "classes": {"labels": {"background": 0, "first": 1, "second": 2}},
    "regions": {"labels": {"background": 0, "both": [1, 2], "second": 2}, "regions_class_order": [1, 2]},
    "classes and ignore": {"labels": {"background": 0, "first": 1, "second": 2, "ignore": 3}},
    "regions and ignore": {
        "labels": {"background": 0, "both": [1, 2], "second": 2, "ignore": 3},
        "regions_class_order": [1, 2],
    },
}
"""The kinds of labels that nnU-Net has, as entries of a ``dataset.json``."""

_PATCH = {2: [24, 24], 3: [12, 16, 20]}
_EPOCHS = 1000


class NotConforming(AssertionError):
    """A method fails checks; the text names every one of them."""


Make = Callable[[], SemiSupervisedTrainer]
"""Makes an initialized trainer, each time with the same weights."""


def check_method(trainer_class: type[SemiSupervisedTrainer], **settings: Any) -> None:
    """Make all checks of this module, in 2D and in 3D.

    Args:
        trainer_class: the method.
        settings: of the plans' ``semi_supervised``, instead of the defaults. Choose them such that every term counts
            on images of noise and a network without training: a threshold of 0.4 instead of 0.95.

    Raises:
        NotConforming: checks have failed; the text names them.
    """
    failed: list[str] = []
    first: Exception | None = None
    for name, check in _checks(trainer_class, settings):
        try:
            check()
        except Exception as error:
            failed.append(f"{name}: {type(error).__name__}: {error}")
            first = first or error
    if failed:
        listed = "\n".join(f"- {one}" for one in failed)
        raise NotConforming(f"{trainer_class.__name__} fails {len(failed)} checks:\n{listed}") from first


def _checks(trainer_class: type[SemiSupervisedTrainer], settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    def of_trainer(dim: int, labels: str, check: Callable[[SemiSupervisedTrainer], None]) -> Callable[[], None]:
        def run() -> None:
            with tiny_trainers(trainer_class, dim=dim, labels=labels, **settings) as make:
                check(make())

        return run

    def of_trainers(dim: int, check: Callable[[Make, Path], None]) -> Callable[[], None]:
        def run() -> None:
            with (
                tiny_trainers(trainer_class, dim=dim, **settings) as make,
                tempfile.TemporaryDirectory() as folder,
            ):
                check(make, Path(folder))

        return run

    for dim in (2, 3):
        yield f"{dim}D, gradients", of_trainer(dim, "classes", check_gradients)
        yield f"{dim}D, a step of every stage", of_trainer(dim, "classes", check_steps)
        yield f"{dim}D, the checkpoint", of_trainers(dim, check_resume)
        yield f"{dim}D, nnU-Net's own network", of_trainers(dim, check_stock_network)
        for labels in LABELS:
            yield f"{dim}D, {labels}, split as stacked", of_trainer(dim, labels, check_split)
            yield f"{dim}D, {labels}, memory estimate", of_trainer(dim, labels, check_memory)
        yield f"{dim}D, bfloat16", of_trainer(dim, "classes", check_autocast)
        yield f"{dim}D, torch.compile", of_trainer(dim, "classes", check_compiled)


# ---- trainers and batches without a data set ------------------------------------------------------------------------


def tiny_plans(*, dim: int, labels: str = "classes", **settings: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Plans with a configuration ``tiny`` of a U-Net of three levels, and a ``dataset.json``.

    Args:
        dim: 2 or 3.
        labels: one of :data:`LABELS`.
        settings: of the plans' ``semi_supervised``.
    """
    resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": f"nnUNetPlans_{CONFIGURATION}",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "batch_dice": True,
        "patch_size": _PATCH[dim],
        "median_image_size_in_voxels": _PATCH[dim],
        "spacing": [1.0] * dim,
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": resampling,
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_seg_kwargs": {**resampling, "is_seg": True, "order": 1},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": {**resampling, "order": 1},
        "architecture": _tiny_unet(dim),
        "semi_supervised": settings,
    }
    intensities = {"percentile_00_5": -2.0, "percentile_99_5": 2.0, "mean": 0.0, "std": 1.0, "min": -4.0, "max": 4.0}
    plans = {
        "dataset_name": "Dataset001_Tiny",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": intensities},
        "configurations": {CONFIGURATION: configuration},
    }
    dataset_json = {"channel_names": {"0": "noise"}, "numTraining": 2, "file_ending": ".nii.gz", **LABELS[labels]}
    return plans, dataset_json


def _tiny_unet(dim: int) -> dict[str, Any]:
    return {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": 3,
            "features_per_stage": [4, 6, 8],
            "conv_op": f"torch.nn.modules.conv.Conv{dim}d",
            "kernel_sizes": [[3] * dim] * 3,
            "strides": [[1] * dim, [2] * dim, [2] * dim],
            "n_conv_per_stage": [1, 1, 1],
            "n_conv_per_stage_decoder": [1, 1],
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dim}d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


@contextmanager
def tiny_trainers(
    trainer_class: type[SemiSupervisedTrainer], *, dim: int, labels: str = "classes", **settings: Any
) -> Iterator[Make]:
    """Gives a function that makes trainers of :func:`tiny_plans`; their folders are gone afterwards.

    Args:
        trainer_class: the method.
        dim: 2 or 3.
        labels: one of :data:`LABELS`.
        settings: of the plans' ``semi_supervised``.
    """

    def make() -> SemiSupervisedTrainer:
        plans, dataset_json = tiny_plans(dim=dim, labels=labels, **settings)
        return initialized(trainer_class, plans, CONFIGURATION, dataset_json)

    with tempfile.TemporaryDirectory() as folder:
        # nnU-Net looks how the preprocessed cases are stored.
        cases = Path(folder) / "preprocessed" / "Dataset001_Tiny" / f"nnUNetPlans_{CONFIGURATION}"
        cases.mkdir(parents=True)
        (cases / "none.b2nd").touch()
        folders = {f"nnUNet_{name}": str(Path(folder) / name) for name in ("raw", "preprocessed", "results")}
        before = {name: os.environ.get(name) for name in (*folders, "nnUNet_wandb_enabled")}
        os.environ.update(folders, nnUNet_wandb_enabled="0")
        try:
            yield make
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def initialized(
    trainer_class: type[SemiSupervisedTrainer],
    plans: Mapping[str, Any],
    configuration: str,
    dataset_json: dict[str, Any],
) -> SemiSupervisedTrainer:
    """A trainer on the CPU with its network, in training mode; the same weights each time. Its folders have to be set.

    Args:
        trainer_class: the method.
        plans: as in the plans file.
        configuration: one of theirs.
        dataset_json: as in the file.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        made = trainer_class({**plans, "continue_training": False}, configuration, 0, dataset_json, torch.device("cpu"))
        torch.manual_seed(0)
        made.initialize()
    made.network.train()
    return made


def make_batches(
    trainer: SemiSupervisedTrainer, u: int = 3, seed: int = 0
) -> tuple[LabeledBatch, UnlabeledBatch, dict[str, Any]]:
    """A labeled batch of two samples and an unlabeled one, of noise; ``train_step`` gets the latter in every step.

    Args:
        trainer: an initialized one; what its method asks for of views and targets is there.
        u: U, unlabeled samples.
        seed: of the noise.

    Returns:
        Both batches as the method gets them, and the labeled one as nnU-Net's loader gives it to ``train_step``.
    """
    generator = torch.Generator().manual_seed(seed)
    np.random.seed(seed)
    patch = tuple(trainer.configuration_manager.patch_size)
    views, deep_supervision = trainer.unlabeled_views(), trainer.enable_deep_supervision
    channels = trainer.num_input_channels
    targets = _targets(trainer, generator)
    image = torch.randn(2, channels, *patch, generator=generator)
    batch = AddTargets(trainer.extra_targets)(data=image, target=targets, keys=["l0", "l1"])

    def views_of_noise() -> Tensor:
        return torch.randn(u, channels, *patch, generator=generator)

    boxes = [views.cutmix.draw(u, patch) for _ in range(views.strong)] if views.cutmix is not None else []
    unlabeled = {
        "weak": views_of_noise(),
        "strong": [views_of_noise() for _ in range(views.strong)],
        "boxes": [torch.from_numpy(one) for one in boxes],
        "partner": (torch.arange(u) + 1) % u,
        "keys": [f"u{i}" for i in range(u)],
    }
    if views.augmented:
        unlabeled["augmented"] = views_of_noise()
    if views.weak_labeled:
        batch["target"] = [*targets, torch.randn(2, channels, *patch, generator=generator)]
    trainer.dataloader_unlabeled = itertools.repeat(unlabeled)
    given = {**batch, "target": batch["target"] if deep_supervision or views.weak_labeled else targets[0]}
    labeled = LabeledBatch.from_loader(
        given, trainer.device, deep_supervision=deep_supervision, weak=views.weak_labeled
    )
    return labeled, UnlabeledBatch.from_loader(unlabeled, trainer.device), batch


def _targets(trainer: SemiSupervisedTrainer, generator: torch.Generator) -> list[Tensor]:
    """The labels of all resolutions, in blocks of four voxels."""
    patch, labels = tuple(trainer.configuration_manager.patch_size), trainer.label_manager
    highest = 3 + labels.has_ignore_label
    target = torch.randint(0, highest, (2, 1, *[n // 4 for n in patch]), generator=generator).float()
    target = torch.nn.functional.interpolate(target, size=patch, mode="nearest")
    if labels.has_regions:
        channels = [(target == 1) | (target == 2), target == 2]
        target = torch.cat(channels + ([target == 3] if labels.has_ignore_label else []), 1).float()
    scales = trainer._get_deep_supervision_scales() or [[1.0] * len(patch)]
    return [torch.nn.functional.interpolate(target, scale_factor=list(map(float, scale))) for scale in scales]


def gradients_of(
    trainer: SemiSupervisedTrainer, labeled: LabeledBatch, unlabeled: UnlabeledBatch, *, mode: MemoryMode
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The terms and the parameters' gradients, by name, of a step in a memory mode; the weights stay as they are."""
    trainer.step_gradients.memory_mode = mode
    torch.manual_seed(11)
    prepared = trainer.prepare(labeled, unlabeled)
    terms = trainer.step_gradients(labeled, unlabeled, prepared, trainer.loss_weights(trainer.progress))
    named = trainer.training_network.named_parameters()
    return terms, {name: parameter.grad.clone() for name, parameter in named if parameter.grad is not None}


def stages_of(trainer: SemiSupervisedTrainer) -> Iterator[str]:
    """Put a trainer into each of its stages, at the last moment of it; gives their names.

    Raises:
        AssertionError: the method never enters one of its stages.
    """
    trainer.num_epochs = _EPOCHS
    last = {trainer.stage(epoch / _EPOCHS): epoch for epoch in range(_EPOCHS)}
    never = [name for name in trainer.stages() if name not in last]
    assert not never, f"stage() never returns {', '.join(never)}"
    for name in trainer.stages():
        trainer.current_epoch = last[name]
        trainer.current_stage = name
        trainer.step_gradients.begin_stage()
        yield name


# ---- checks of a trainer --------------------------------------------------------------------------------------------


def check_gradients(trainer: SemiSupervisedTrainer) -> None:
    """A gradient reaches every parameter that learns, in some stage, and none reaches a teacher.

    Those heads of lower resolutions that no loss is taken of may be without.
    """
    labeled, unlabeled, _ = make_batches(trainer)
    _unlike_the_student(trainer)
    reached: set[str] = set()
    supervised: set[tuple[str | None, str | None]] = set()
    for _ in stages_of(trainer):
        streams = trainer.streams().values()
        supervised |= {(one.network, one.decoder) for one in streams if one.gradient and one.deep_supervision}
        _, gradients = gradients_of(trainer, labeled, unlabeled, mode="stacked")
        for name, gradient in gradients.items():
            assert torch.isfinite(gradient).all(), f"the gradient of {name} is not finite"
            reached.add(name)
    teachers = sorted(name for name in reached if name.startswith("training_only.teacher."))
    assert not teachers, f"gradients reach the teacher: {', '.join(teachers)}"
    parameters = trainer.training_network.named_parameters()
    learning = [name for name, parameter in parameters if parameter.requires_grad]
    missed = [name for name in learning if name not in reached and not _may_be_without(name, supervised)]
    assert not missed, f"no gradient reaches {', '.join(missed)}"


def _may_be_without(name: str, supervised: set[tuple[str | None, str | None]]) -> bool:
    """Whether a parameter is one of a head of lower resolution that no loss is taken of."""
    found = re.fullmatch(
        r"(?:training_only\.network_(?P<network>\w+)\.)?(?:training_only\.decoder_(?P<other>\w+)|decoder)"
        r"\.seg_layers\.(?P<level>\d+)\.\w+",
        name,
    )
    if found is None:
        return False
    # nnU-Net's deep supervision gives the lowest resolution no weight.
    return found["level"] == "0" or (found["network"], found["other"]) not in supervised


def check_split(trainer: SemiSupervisedTrainer) -> None:
    """In every stage both memory modes make the same terms, which are finite and weighted, and the same gradients."""
    labeled, unlabeled, _ = make_batches(trainer)
    _unlike_the_student(trainer)
    for _ in stages_of(trainer):
        terms, gradients = gradients_of(trainer, labeled, unlabeled, mode="stacked")
        split_terms, split_gradients = gradients_of(trainer, labeled, unlabeled, mode="split")
        _same_names(split_terms, terms, "the terms")
        for name, value in split_terms.items():
            assert torch.isfinite(value), f"the term {name} is not finite"
            torch.testing.assert_close(value, terms[name], rtol=1e-4, atol=1e-6, msg=_of(f"the term {name}"))
        _same_names(split_gradients, gradients, "the parameters with a gradient")
        scale = max(gradient.abs().max() for gradient in gradients.values()).item()
        for name, gradient in split_gradients.items():
            torch.testing.assert_close(
                gradient, gradients[name], rtol=1e-4, atol=1e-5 * scale, msg=_of(f"the gradient of {name}")
            )


def _same_names(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    unlike = sorted(set(found) ^ set(expected))
    assert not unlike, f"{what} of split and stacked differ: {', '.join(unlike)}"


def _of(what: str) -> Callable[[str], str]:
    return lambda message: f"{what}: {message}"


def _unlike_the_student(trainer: SemiSupervisedTrainer) -> None:
    """Make the teacher, if there is one, another network than the student."""
    if trainer.training_network.has_teacher:
        with torch.no_grad():
            for parameter in trainer.training_network.teacher.parameters():
                parameter.mul_(0.7)


def check_steps(trainer: SemiSupervisedTrainer) -> None:
    """A step of every stage has finite terms and moves weights, and each of the method's terms is in some stage."""
    _, _, batch = make_batches(trainer)
    found: set[str] = set()
    for stage in stages_of(trainer):
        before = _tensors(trainer.training_network)
        values = trainer.train_step(batch)
        found |= {name.removeprefix("loss/") for name in values if name.startswith("loss/")}
        broken = [name for name, value in values.items() if not np.isfinite(value)]
        assert not broken, f"not finite in stage {stage}: {', '.join(broken)}"
        after = _tensors(trainer.training_network)
        assert any(not torch.equal(after[name], before[name]) for name in before), f"no weight moves in stage {stage}"
    never = sorted(set(trainer.loss_weights(1.0)) - found)
    assert not never, f"loss_terms() never yields {', '.join(never)}, of loss_weights()"


def _tensors(network: TrainingNetwork) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in [*network.named_parameters(), *network.named_buffers()]}


def check_resume(make: Make, folder: Path) -> None:
    """A training that goes on from a checkpoint is, bit for bit, the one that was not interrupted, in every stage.

    Args:
        make: makes trainers.
        folder: for the checkpoint.
    """
    first, second = make(), make()
    _, _, batch = make_batches(first)
    make_batches(second)
    first.logger.log("ema_fg_dice", 0.5, 0)
    for stage in stages_of(first):
        for _ in range(3):
            first.train_step(batch)
        _goes_on(first, second, batch, folder / "checkpoint_latest.pth", stage)


def _goes_on(
    first: SemiSupervisedTrainer, second: SemiSupervisedTrainer, batch: dict[str, Any], file: Path, stage: str
) -> None:
    epoch = first.current_epoch
    with contextlib.redirect_stdout(io.StringIO()):
        first.save_checkpoint(str(file))
        second.load_checkpoint(str(file))
    # The checkpoint is that of the epoch's end, and the next one may be of another stage.
    second.num_epochs, second.current_epoch = first.num_epochs, epoch
    for trainer in (first, second):
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.on_train_epoch_start()
        torch.manual_seed(5)
        for _ in range(2):
            trainer.train_step(batch)
    one, two = _tensors(first.training_network), _tensors(second.training_network)
    assert list(one) == list(two)
    unlike = [name for name, tensor in one.items() if not torch.equal(tensor, two[name])]
    assert not unlike, f"after a checkpoint in stage {stage} others: {', '.join(unlike)}"


def check_stock_network(make: Make, folder: Path) -> None:
    """A checkpoint's weights load into nnU-Net's own network, which then predicts as the trainer does.

    Args:
        make: makes trainers.
        folder: for the checkpoint.
    """
    trainer = make()
    _, _, batch = make_batches(trainer)
    trainer.train_step(batch)
    trainer.logger.log("ema_fg_dice", 0.5, 0)
    file = folder / "checkpoint_final.pth"
    trainer.save_checkpoint(str(file))
    weights = torch.load(file, weights_only=True)["network_weights"]
    build = getattr(type(trainer), "build_network_architecture")  # noqa: B009 - shadowed on the instance
    stock = build(
        trainer.plans_manager,
        trainer.configuration_manager,
        trainer.num_input_channels,
        trainer.label_manager.num_segmentation_heads,
        enable_deep_supervision=False,
    )
    assert list(stock.state_dict()) == list(weights), "the checkpoint has other weights than nnU-Net's network"
    stock.load_state_dict(weights, strict=True)
    trainer.set_deep_supervision_enabled(False)
    with torch.no_grad():
        same = torch.equal(stock(batch["data"]), trainer.network(batch["data"]))
    assert same, "nnU-Net's network predicts otherwise with the checkpoint's weights"


def check_autocast(trainer: SemiSupervisedTrainer) -> None:
    """In mixed precision the terms of every stage are of float32 and finite, and so are the gradients."""
    labeled, unlabeled, _ = make_batches(trainer)
    trainer.step_gradients.autocast = lambda: torch.autocast("cpu", dtype=torch.bfloat16)
    for stage in stages_of(trainer):
        for mode in ("stacked", "split"):
            terms, gradients = gradients_of(trainer, labeled, unlabeled, mode=mode)
            for name, value in terms.items():
                assert value.dtype == torch.float32 and torch.isfinite(value), f"the term {name} in stage {stage}"
            broken = [name for name, gradient in gradients.items() if not torch.isfinite(gradient).all()]
            assert not broken, f"gradients that are not finite in stage {stage}: {', '.join(broken)}"


def check_compiled(trainer: SemiSupervisedTrainer, *, backend: str = "aot_eager", steps: int = 2) -> None:
    """Stacked and compiled, the passes of a stage's first step are one graph, without a break, and serve later steps.

    Passes of :meth:`~nnunet_ssl.trainer.base.SemiSupervisedTrainer.without_gradient` have graphs of their own.

    Args:
        trainer: an initialized one.
        backend: of ``torch.compile``.
        steps: of each stage.
    """
    _, _, batch = make_batches(trainer)
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    breaks = dict(counters["graph_break"])
    trainer.network = torch.compile(trainer.network, backend=backend, fullgraph=True)
    trainer.prepare_steps()
    trainer.step_gradients.memory_mode = "stacked"
    try:
        for stage in stages_of(trainer):
            before = counters["stats"]["unique_graphs"]
            trainer.train_step(batch)
            first = counters["stats"]["unique_graphs"]
            assert first > before, f"nothing is compiled in stage {stage}"
            for _ in range(steps - 1):
                trainer.train_step(batch)
            more = counters["stats"]["unique_graphs"] - first
            assert more == 0, f"later steps of stage {stage} make {more} more graphs"
        assert dict(counters["graph_break"]) == breaks, f"graphs break: {', '.join(counters['graph_break'])}"
    finally:
        torch._dynamo.reset()


def check_memory(trainer: SemiSupervisedTrainer) -> None:
    """The memory of a step can be computed in every mode before a training, and is that of an initialized trainer."""
    plans = PlansManager(trainer.plans_manager.plans)
    of_plans = trainer_of_plans(type(trainer), plans, trainer.configuration_name, trainer.dataset_json)
    modes: tuple[Mode, ...] = ("supervised", "split", "stacked")
    for mode in modes:
        expected = step_bytes(trainer, mode, mixed_precision=True)
        found = step_bytes(of_plans, mode, mixed_precision=True)
        assert found == expected, f"{mode}: {found} of plans, {expected} of the initialized trainer"
        assert found.peak > found.before > 0
