"""Loss terms and gradients stay finite: extreme logits, half precision, empty and constant images, absent classes."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from method_steps import images_of, make_batches, make_of_table, of_methods, terms_of

from nnunet_ssl.networks.heads import unit_length
from nnunet_ssl.networks.streams import StreamOutput


class Outputs(dict):
    """Outputs of streams that were not run."""

    def peek(self, name: str) -> StreamOutput:
        return self[name].detach()


def made_up_outputs(streams, shapes, make) -> tuple[Outputs, list[torch.Tensor]]:
    """Outputs of all streams, made by ``make(shape)`` in the shapes of given ones, and tensors that need a gradient."""
    leaves = []

    def leaf(like: torch.Tensor, gradient: bool) -> torch.Tensor:
        tensor = make(like.shape)
        if gradient:
            leaves.append(tensor.requires_grad_())
        return tensor

    def output(like: StreamOutput, gradient: bool) -> StreamOutput:
        logits = like.logits
        return StreamOutput(
            [leaf(one, gradient) for one in logits] if isinstance(logits, list) else leaf(logits, gradient),
            None if like.features is None else leaf(like.features, False),
            None if like.bottleneck is None else leaf(like.bottleneck, gradient),
            # Heads put out what is bounded: a tanh, and vectors of unit length.
            None if like.head is None else {
                name: (unit_length if name == "projection" else torch.tanh)(leaf(one, gradient))
                for name, one in like.head.items()
            },
        )  # fmt: skip

    return Outputs({name: output(shapes[name], stream.gradient) for name, stream in streams.items()}), leaves


@of_methods(
    "method, dtype, regions",
    itertools.product([torch.float16, torch.float32, torch.bfloat16], [False, True]),
    fast=1,
    of_representative=2,
)
def test_terms_and_gradients_are_finite_for_any_logits(method, regions, dtype, planned_2d, monkeypatch, tmp_path):
    trainer = make_of_table(method, planned_2d, monkeypatch, tmp_path, regions=regions, ignore=regions)
    labeled, unlabeled, _ = make_batches(trainer)
    streams = trainer.streams()
    with torch.no_grad():
        shapes = trainer.training_network(images_of(trainer, labeled, unlabeled), streams, {})
    largest = min(torch.finfo(dtype).max, 1e6)
    scales = st.sampled_from([0.0, 1e-6, 1e-3, 1.0, 30.0, 1e3, largest])

    @settings(max_examples=40, suppress_health_check=list(HealthCheck), database=None)
    @given(seed=st.integers(0, 2**31), scale=scales, offset=scales, constant=st.booleans())
    def check(seed, scale, offset, constant):
        generator = torch.Generator().manual_seed(seed)

        def make(shape):
            values = torch.zeros(shape) if constant else torch.randn(shape, generator=generator)
            values = values * scale
            values[:, -1] += offset  # of logits, one class far ahead everywhere
            return values.clamp(-largest, largest).to(dtype)

        outputs, leaves = made_up_outputs(streams, shapes, make)
        terms: dict[str, torch.Tensor] = {}
        for part in terms_of(trainer, outputs, labeled, unlabeled):
            for name, value in part.items():
                # nnU-Net's own loss is not ours to hold to this.
                if not name.startswith("supervised"):
                    terms[name] = terms.get(name, 0) + value
        for name, value in terms.items():
            assert value.dtype == torch.float32 and torch.isfinite(value), (name, value)
        torch.stack([*terms.values()]).sum().backward()
        for tensor in leaves:
            assert tensor.grad is None or torch.isfinite(tensor.grad).all()

    check()


def zeros(image):
    return torch.zeros_like(image)


def threes(image):
    return torch.full_like(image, 3.0)


def outliers(image):
    image = image.clone()
    image.flatten(1)[:, ::97] = 1e4
    image.flatten(1)[:, 1::97] = -1e4
    return image


@of_methods("method, change", [(zeros,), (threes,), (outliers,)])
def test_odd_unlabeled_images_train(method, change, planned_2d, monkeypatch, tmp_path):
    trainer = make_of_table(method, planned_2d, monkeypatch, tmp_path, ramp_length=0.0)
    _, unlabeled, batch = make_batches(trainer)
    odd = unlabeled._replace(weak=change(unlabeled.weak), strong=[change(view) for view in unlabeled.strong])
    trainer.dataloader_unlabeled = itertools.repeat(odd._asdict())
    for _ in range(3):
        values = trainer.train_step(batch)
        assert all(np.isfinite(value) for value in values.values()), values
    assert all(torch.isfinite(parameter).all() for parameter in trainer.network.parameters())


@of_methods("method, regions", [(False,), (True,)])
def test_labels_and_pseudo_labels_without_a_class_train(method, regions, planned_2d, monkeypatch, tmp_path):
    has_threshold = any(one.name == "confidence_threshold" for one in dataclasses.fields(method.settings_class))
    options = {"confidence_threshold": 1.0} if has_threshold else {}
    trainer = make_of_table(method, planned_2d, monkeypatch, tmp_path, regions=regions, ramp_length=0.0, **options)
    _, _, batch = make_batches(trainer)
    # No second class in the labels, and a network that puts out the first class alone, from pseudo-labels none of
    # which reaches a threshold of 1.
    batch["target"] = [torch.zeros_like(one) if regions else one.clamp(max=1) for one in batch["target"]]
    with torch.no_grad():
        for layer in trainer.training_network.decoder.seg_layers:
            layer.weight.zero_()
            layer.bias.copy_(torch.arange(len(layer.bias), 0, -1))
    for _ in range(3):
        values = trainer.train_step(batch)
        assert all(np.isfinite(value) for value in values.values()), values
        if has_threshold:
            unsupervised = {name for name in trainer.loss_weights(1.0) if not name.startswith("supervised")}
            assert unsupervised
            assert all(values[f"loss/{name}"] == pytest.approx(0, abs=1e-6) for name in unsupervised), values
    assert all(torch.isfinite(parameter).all() for parameter in trainer.network.parameters())


@pytest.mark.slow
@of_methods()
def test_a_collapse_is_said_once_and_drawn(method, planned_2d, monkeypatch, tmp_path):
    """A network that predicts background alone, epoch for epoch."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    trainer = make_of_table(method, planned_2d, monkeypatch, tmp_path)
    trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 7, 2, 1
    trainer.initial_lr = 0.0
    trainer.optimizer, trainer.lr_scheduler = trainer.configure_optimizers()
    with torch.no_grad():
        for decoder in trainer.training_network.modules():
            for layer in getattr(decoder, "seg_layers", ()):
                layer.weight.zero_()
                layer.bias.copy_(torch.tensor([9.0, 0.0, 0.0]))
    trainer.run_training()
    logged = trainer.logger.local_logger.my_fantastic_logging
    assert logged["ssl/share/unlabeled_per_class"] == [[0.0, 0.0]] * 7
    share = np.mean(logged["ssl/share/labeled_per_class"], 0)
    assert (share > 0).all() and share.sum() == pytest.approx(np.mean(logged["ssl/share/labeled"]))
    assert logged["ssl/share/collapsed_per_class"] == [[0.0, 0.0]] * 4 + [[1.0, 1.0]] * 3
    log = next(tmp_path.glob("*/*/fold_0/training_log*")).read_text()
    assert log.count("Warning: for 5 epochs, class or region 1 was predicted in 0.000%") == 1
    assert log.count("Warning: for 5 epochs, class or region 2 was predicted in 0.000%") == 1
