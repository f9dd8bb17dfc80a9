"""Every method's step on a GPU, without one: nothing is on two devices, the host waits as rarely as in nnU-Net's step.

nnU-Net's own step waits twice: its gradient scaler asks whether a gradient overflowed, and the loss goes to the log.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from fake_cuda import CUDA, backward, fake_cuda, move_to_fake_cuda
from method_steps import BY_NAME, gradients_step, make_batches, make_of_table, make_trainer, of_methods
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch._subclasses.fake_tensor import FakeTensor

from nnunet_ssl.data.predicted_foreground import ANYWHERE, Aim, PredictedForeground, coordinates_of, subsampled

MODES = ("split", "stacked")


@pytest.fixture
def make(monkeypatch, tmp_path):
    def factory(method, planned, **options):
        make_one = make_of_table if method.__name__ in BY_NAME else make_trainer
        return make_one(method, planned, monkeypatch, tmp_path, **options)

    return factory


def waits_of_a_step(trainer, batch, mode: str | None = None) -> list[str]:
    """Where the host waits for the GPU in a trainer's first step there; of a method, in a memory mode."""
    with fake_cuda() as waits:
        trainer.device = CUDA
        move_to_fake_cuda(trainer.network)
        trainer.optimizer, _ = trainer.configure_optimizers()
        trainer.grad_scaler = torch.GradScaler("cuda")
        if mode is not None:
            trainer.prepare_steps()
            trainer.step_gradients.memory_mode = mode
        trainer.train_step(batch)
    for name, parameter in trainer.network.named_parameters():
        assert isinstance(parameter, FakeTensor) and parameter.device == CUDA, name
    assert trainer.optimizer.state, "the optimizer stepped"
    return waits.found


def cut_at_rare_classes(trainer) -> None:
    """As from the second epoch on, with every class rare: half of the patches are cut at a rare class."""
    unlabeled = next(trainer.dataloader_unlabeled)
    patch, keys = trainer.configuration_manager.patch_size, unlabeled["keys"]
    box = [[5, 6]] * (3 - len(patch)) + [[0, length] for length in patch]
    coordinates = coordinates_of(box) if len(patch) == 3 else coordinates_of(box)[:, 0]
    aims = [ANYWHERE if number < len(keys) / 2 else Aim(0, np.zeros(3, np.int32)) for number in range(len(keys))]
    unlabeled |= {"aims": aims, "coordinates": torch.stack([subsampled(coordinates)] * len(keys))}
    trainer.dataloader_unlabeled = itertools.repeat(unlabeled)
    trainer.predictions.foreground = PredictedForeground(keys, trainer.num_structures)
    trainer.predictions.foreground.rare = range(trainer.num_structures)


# Options of the trainer, whether every class is rare, unlabeled patches.
KINDS = {
    "classes": ("planned_2d", {}, False, 2),
    "rare classes": ("planned_3d", {}, True, 2),
    "rare regions": ("planned_2d", {"regions": True, "residual": True}, True, 6),
    "ignore label": ("planned_3d", {"ignore": True}, False, 2),
    "regions and ignore label": ("planned_3d", {"regions": True, "ignore": True}, False, 2),
    "many rare classes": ("planned_2d", {"classes": 104}, True, 6),
}


@of_methods("method, mode, kind", itertools.product(MODES, KINDS), fast=1)
def test_the_host_waits_as_rarely_as_in_nnunets_step(make, request, monkeypatch, method, mode, kind):
    dim, options, rare, u = KINDS[kind]
    planned = request.getfixturevalue(dim)
    trainer = make(method, planned, **options)
    labeled, _, batch = make_batches(trainer, u=u)
    if rare:
        cut_at_rare_classes(trainer)
    losses, loss = [], trainer.loss
    monkeypatch.setattr(trainer, "loss", lambda *given: losses.append(given) or loss(*given))
    found = waits_of_a_step(trainer, batch, mode)
    nnunets = waits_of_a_step(make(nnUNetTrainer, planned, **options), {**batch, "target": labeled.target})
    # With an ignore label, nnU-Net's loss asks whether there is any other one, each time it is called.
    in_loss = [wait for wait in nnunets if "compound_losses" in wait]
    assert len(nnunets) - len(in_loss) == 2, nnunets
    assert len(found) == 2 + len(losses) * len(in_loss), "\n".join(found)
    if rare:  # a transfer without content says that voxel 0 is of every class
        known = [trainer.predictions.foreground.draw(key).structure for key in ["u0", f"u{u - 1}"] * 20]
        assert min(known) >= 0 and len(set(known)) > 1


# ---- the means of this test -----------------------------------------------------------------------------------------


@of_methods("method, mode", itertools.product(MODES))
def test_the_backward_pass_of_this_test_is_pytorchs(make, planned_2d, monkeypatch, method, mode):
    trainer = make(method, planned_2d)
    labeled, unlabeled, _ = make_batches(trainer)
    trainer.step_gradients.memory_mode = mode
    gradients = []
    for ours in (False, True):
        if ours:
            monkeypatch.setattr(torch.autograd, "backward", backward)
        torch.manual_seed(11)
        gradients_step(trainer, labeled, unlabeled, trainer.loss_weights(1.0))
        gradients.append({n: p.grad.clone() for n, p in trainer.network.named_parameters() if p.grad is not None})
    pytorchs, found = gradients
    assert set(found) == set(pytorchs)
    scale = max(gradient.abs().max() for gradient in pytorchs.values()).item()
    for name, gradient in pytorchs.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6 * scale, msg=name)


@pytest.mark.parametrize(
    ("operation", "waits"),
    [
        (lambda x: x.sum().item(), 1),
        (lambda x: bool(x.sum() > 0), 1),
        (lambda x: (x > 0).nonzero(), 1),
        (lambda x: x.cpu(), 1),
        (lambda x: x.tolist(), 16),
        (lambda x: torch.zeros(3).to(x.device), 1),
        (lambda x: torch.tensor([1.0], device=x.device), 1),
        (lambda x: x.copy_(torch.zeros(4, 4)), 1),
        (lambda x: x[[0, 1]], 1),
        (lambda x: x[torch.tensor([0, 1])], 1),
        (lambda x: x.index_put_((torch.tensor([0, 1]),), x[:2]), 1),
        (lambda x: x[torch.arange(2, device=x.device)], 0),
        (lambda x: torch.zeros(3).to(x.device, non_blocking=True), 0),
        (lambda x: torch.full((2,), 3.0, device=x.device), 0),
        (lambda x: torch.where(x > 0, x, 0.0) * 2 + torch.tensor(1.0), 0),
    ],
)
def test_every_wait_is_found(operation, waits):
    with fake_cuda() as found:
        x = torch.zeros(4, 4, device=CUDA)
        operation(x)
    assert len(found.found) == waits, found.found


@pytest.mark.parametrize("operation", [lambda x: x[x > 0], lambda x: x.masked_select(x > 0), lambda x: x.unique()])
def test_a_result_whose_size_depends_on_content_is_refused(operation):
    with fake_cuda() as found, pytest.raises(Exception, match=r"nonzero|masked_select|_unique2"):
        operation(torch.zeros(4, 4, device=CUDA))
    assert len(found.found) == 1


def test_tensors_of_two_devices_are_refused():
    with fake_cuda(), pytest.raises(RuntimeError, match="at least two devices"):
        torch.zeros(4, device=CUDA) + torch.zeros(4)
