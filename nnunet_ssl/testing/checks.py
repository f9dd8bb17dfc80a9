"""The checks that hold for every method, one by one."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor

from nnunet_ssl.compiled import compiling_with
from nnunet_ssl.networks.training_network import TrainingNetwork
from nnunet_ssl.testing.tiny import Make, make_batches
from nnunet_ssl.trainer.base import SemiSupervisedTrainer
from nnunet_ssl.trainer.batches import LabeledBatch, UnlabeledBatch
from nnunet_ssl.trainer.gradients import MemoryMode
from nnunet_ssl.trainer.memory import Mode, step_bytes, trainer_of_plans
from nnunet_ssl.trainer.method_checks import last_moments, unknown_modules

_EPOCHS = 1000


def gradients_of(
    trainer: SemiSupervisedTrainer, labeled: LabeledBatch, unlabeled: UnlabeledBatch, *, mode: MemoryMode
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The terms and the parameters' gradients, by name, of a step in a memory mode; the weights stay as they are."""
    trainer.step_gradients.memory_mode = mode
    torch.manual_seed(11)
    given = {**_tensors_of("labeled", labeled), **_tensors_of("unlabeled", unlabeled)}
    before = {name: tensor.clone() for name, tensor in given.items()}
    prepared = trainer.step_gradients.prepare(labeled, unlabeled)
    terms = trainer.step_gradients(labeled, unlabeled, prepared, trainer.loss_weights(trainer.progress))
    changed = [name for name, tensor in given.items() if not torch.equal(tensor, before[name])]
    assert not changed, f"a hook changes {', '.join(changed)} in place; work on a copy, such as image.clone()"
    named = trainer.training_network.named_parameters()
    return terms, {name: parameter.grad.clone() for name, parameter in named if parameter.grad is not None}


def _tensors_of(name: str, value: Any) -> dict[str, Tensor]:
    """The tensors of a batch, by the names under which a method sees them."""
    if isinstance(value, Tensor):
        return {name: value}
    if hasattr(value, "_asdict"):
        inside = {f"{name}.{key}": one for key, one in value._asdict().items()}
    elif isinstance(value, (list, tuple)):
        inside = {f"{name}[{index}]": one for index, one in enumerate(value)}
    else:
        inside = {f"{name}[{key!r}]": one for key, one in value.items()} if isinstance(value, Mapping) else {}
    return {key: tensor for path, one in inside.items() for key, tensor in _tensors_of(path, one).items()}


def stages_of(trainer: SemiSupervisedTrainer) -> Iterator[str]:
    """Put a trainer into each of its stages, at the last moment of it; gives their names.

    Raises:
        AssertionError: the method never enters one of its stages.
    """
    trainer.num_epochs = _EPOCHS
    last = last_moments(trainer.stage, trainer.stages())
    never = [name for name in trainer.stages() if name not in last]
    assert not never, f"stage() never returns {', '.join(never)}; it returns {', '.join(map(str, last))}"
    for name in trainer.stages():
        trainer.current_epoch = round(last[name] * _EPOCHS)
        trainer.current_stage = name
        trainer.step_gradients.begin_stage()
        yield name


def check_gradients(trainer: SemiSupervisedTrainer) -> None:
    """A gradient reaches every parameter that learns, in some stage, and none reaches a teacher.

    A teacher runs in some stage, or predicts.

    Those heads of lower resolutions that no loss is taken of may be without.
    """
    labeled, unlabeled, _ = make_batches(trainer)
    _unlike_the_student(trainer)
    network = trainer.training_network
    idle = network.has_teacher and not network.predict_with_teacher

    def run(*_: Any) -> None:
        nonlocal idle
        idle = False

    watched = network.teacher.encoder.register_forward_hook(run) if idle else None
    reached: set[str] = set()
    supervised: set[tuple[str | None, str | None]] = set()
    for _ in stages_of(trainer):
        streams = trainer.streams().values()
        supervised |= {(one.network, one.decoder) for one in streams if one.gradient and one.deep_supervision}
        _, gradients = gradients_of(trainer, labeled, unlabeled, mode="stacked")
        for name, gradient in gradients.items():
            assert torch.isfinite(gradient).all(), f"the gradient of {name} is not finite"
            reached.add(name)
    if watched is not None:
        watched.remove()
    assert not idle, (
        "the teacher is never run: set teacher=True, gradient=False in its Stream, or let it predict with the setting "
        "predict_with"
    )
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
        assert gradients, "no parameter gets a gradient"
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
    """A step of every stage has finite terms and moves weights.

    Each of the method's terms is in some stage, and so is a prediction on unlabeled images for the log.
    """
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
    assert "share/unlabeled" in trainer.epoch_log.counts, (
        "record_prediction() is never called: without it the log does not warn of a collapse, and no patch is centered "
        "on a rare class. Call it with the logits of any stream of unlabeled images"
    )
    warnings = unknown_modules(vars(trainer), trainer.training_network.parameters())
    assert not warnings, "; ".join(warnings)


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
    breaks = dict(counters["graph_break"])
    with compiling_with(backend):
        trainer.network = torch.compile(trainer.network, fullgraph=True)
        trainer.prepare_steps()
        trainer.step_gradients.memory_mode = "stacked"
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
