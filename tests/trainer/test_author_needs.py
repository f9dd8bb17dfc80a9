"""What the authors of methods need of the base, by methods written as someone else would, and mistakes named."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from author_methods import MeanTeacher, TwoNetworks, changed
from method_steps import make_short
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from nnunet_ssl import testing
from nnunet_ssl.api import MethodError, Stream
from nnunet_ssl.cli.training_checks import check_memory as doctors_check_memory
from nnunet_ssl.networks import passes as passes_module
from nnunet_ssl.testing import make_batches, stages_of, tiny_plans, tiny_trainers
from nnunet_ssl.testing.checks import check_gradients
from nnunet_ssl.trainer.memory import step_bytes

METHODS = pytest.mark.parametrize("method", [MeanTeacher, TwoNetworks], ids=lambda method: method.__name__)


# ---- the methods conform --------------------------------------------------------------------------------------------


@METHODS
@pytest.mark.parametrize(
    ("dim", "labels"), [(2, "classes"), (2, "regions and ignore"), (3, "classes")], ids=lambda value: str(value)
)
def test_gradients_memory_modes_and_the_estimate(method, dim, labels, made) -> None:
    testing.check_gradients(made(method, dim=dim, labels=labels))
    testing.check_split(made(method, dim=dim, labels=labels))
    testing.check_memory(made(method, dim=dim, labels=labels))


@METHODS
def test_steps_checkpoints_mixed_precision_and_compile(method, made, tmp_path) -> None:
    testing.check_steps(made(method))
    testing.check_autocast(made(method))
    testing.check_compiled(made(method))
    with tiny_trainers(method, dim=2) as make:
        testing.check_resume(make, tmp_path)
        testing.check_stock_network(make, tmp_path)


def test_a_method_that_fails_checks_hears_of_every_one(monkeypatch) -> None:
    class Broken(MeanTeacher):
        def after_optimizer_step(self):
            pass

        def loss_weights(self, progress):
            return {**super().loss_weights(progress), "never": 1.0}

    some = ("2D, a step of every stage", "2D, the checkpoint", "2D, classes, split as stacked")
    checks = testing._checks
    monkeypatch.setattr(testing, "_checks", lambda *given: (one for one in checks(*given) if one[0] in some))
    with pytest.raises(testing.NotConforming, match=r"Broken fails 2 checks") as raised:
        testing.check_method(Broken)
    of_both = "- 2D, a step of every stage; 2D, the checkpoint: MethodError: The network has a teacher"
    assert of_both in str(raised.value) and str(raised.value).count("did not move") == 1
    monkeypatch.setattr(Broken, "after_optimizer_step", MeanTeacher.after_optimizer_step)
    with pytest.raises(testing.NotConforming, match=r"1 checks:\n- 2D, a step .*never yields never"):
        testing.check_method(Broken)
    testing.check_method(MeanTeacher)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda labeled, _: labeled.image.mul_(2), r"labeled\.image"),
        (lambda labeled, _: labeled.target[1].fill_(0), r"labeled\.target\[1\]"),
        (lambda _, unlabeled: unlabeled.weak.add_(1), r"unlabeled\.weak"),
    ],
)
def test_a_batch_that_is_changed_in_place_is_named(change, name, made) -> None:
    def images(self, labeled, unlabeled, prepared):
        change(labeled, unlabeled)
        return MeanTeacher.images(self, labeled, unlabeled, prepared)

    trainer = made(changed(images=images))
    with pytest.raises(AssertionError, match=rf"a hook changes {name} in place; work on a copy"):
        check_gradients(trainer)


# ---- prepare --------------------------------------------------------------------------------------------------------


def test_what_is_prepared_reaches_images_and_terms_and_carries_no_gradient(made) -> None:
    trainer = made(MeanTeacher)
    labeled, unlabeled, _ = make_batches(trainer)
    torch.manual_seed(1)
    prepared = trainer.prepare(labeled, unlabeled)
    assert not prepared.mean.requires_grad
    torch.testing.assert_close(prepared.mean.sum(1), torch.ones(3, 24, 24))
    stream = Stream("any", dropout=0.5, teacher=True, gradient=False)
    one, two = (trainer.without_gradient(unlabeled.weak, stream).logits for _ in range(2))
    assert not torch.equal(one, two), "each pass draws its own dropout"
    plain = trainer.without_gradient(unlabeled.weak, Stream("any", teacher=True, gradient=False)).logits
    with torch.no_grad():
        teacher = trainer.training_network.teacher
        torch.testing.assert_close(plain, teacher.decoder(teacher.encoder(unlabeled.weak))[0])
    found, terms = [], []
    images, loss_terms = trainer.images, trainer.loss_terms
    trainer.images = lambda *given: found.append(given[-1]) or images(*given)
    trainer.loss_terms = lambda *given: terms.append(given[-1]) or loss_terms(*given)
    trainer.step_gradients(labeled, unlabeled, prepared, trainer.loss_weights(1.0))
    assert found == [prepared] and found[0] is terms[0] is prepared


# ---- stages ---------------------------------------------------------------------------------------------------------


def test_a_term_that_a_stage_does_not_have_is_nan_in_its_epochs_and_all_is_drawn(planned_2d, environment, tmp_path):
    os.environ["nnUNet_n_proc_DA"] = "0"
    trainer = make_short(TwoNetworks, planned_2d, tmp_path, epochs=2, steps=2)
    trainer.run_training()
    logged = trainer.logger.local_logger.my_fantastic_logging
    mutual = logged["ssl/loss/mutual"]
    assert len(mutual) == 2 and math.isnan(mutual[0]) and math.isfinite(mutual[1])
    assert np.isfinite(logged["ssl/loss/distance"]).all() and np.isfinite(logged["ssl/loss/total"]).all()
    assert (Path(trainer.output_folder) / "progress_ssl.png").stat().st_size > 10_000
    (log,) = Path(trainer.output_folder).glob("training_log_*.txt")
    assert "Stage together" in log.read_text()


def test_the_estimate_is_that_of_the_largest_stage(made) -> None:
    trainer = made(TwoNetworks)

    def peak(stages: tuple[str, ...], mode: str) -> int:
        trainer.stages = lambda: stages
        return step_bytes(trainer, mode, mixed_precision=False).peak

    for mode in ("split", "stacked"):
        alone, together = peak(("alone",), mode), peak(("together",), mode)
        assert alone < together == peak(("alone", "together"), mode) == peak(("together", "alone"), mode)


def test_the_estimate_asks_for_the_weights_of_each_stages_own_moments(made) -> None:
    class Late(TwoNetworks):
        def loss_weights(self, progress):
            assert 0 <= progress < 1
            weights = super().loss_weights(progress)
            return weights if progress >= 0.5 else {name: weights[name] for name in ("supervised", "distance")}

    assert step_bytes(made(Late), "split", mixed_precision=True).peak > 0


def test_the_estimate_takes_a_module_on_a_heads_float32_output(made) -> None:
    class Projected(TwoNetworks):
        def build_training_network(self, network):
            network = super().build_training_network(network)
            network.training_only["projector"] = nn.Conv2d(self.num_structures, 4, 1)
            return network

        def loss_terms(self, outputs, labeled, unlabeled, prepared):
            projector = self.training_network.training_only["projector"]
            for part in super().loss_terms(outputs, labeled, unlabeled, prepared):
                if "distance" in part:
                    part["distance"] = part["distance"] + projector(outputs["x_a"].head["distance"].float()).mean()
                yield part

    check_gradients(made(Projected))
    assert step_bytes(made(Projected), "split", mixed_precision=True).peak > 0


def test_doctor_estimates_a_method_with_stages() -> None:
    plans, dataset_json = tiny_plans(dim=2)
    (finding, *_) = doctors_check_memory(TwoNetworks, PlansManager(plans), "tiny", dataset_json)
    assert "TwoNetworks split" in finding.text and "batches of 2 + 2" in finding.text


def test_a_stage_that_is_none_is_named(made, monkeypatch) -> None:
    trainer = made(TwoNetworks)
    _, _, batch = make_batches(trainer)
    monkeypatch.setattr(trainer, "stage", lambda progress: "alnoe")
    with pytest.raises(MethodError, match=r"'alnoe', which is none of stages.*: alone, together"):
        trainer.train_step(batch)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    results = tmp_path_factory.mktemp("two_processes")
    script = Path(__file__).with_name("author_steps.py")
    done = subprocess.run(
        [*(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"), script, results],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return [torch.load(results / f"rank_{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("mode", ["stacked", "split"])
def test_two_processes_hold_the_same_second_network_in_every_stage(ranks, mode) -> None:
    first, second = (rank[mode] for rank in ranks)
    assert list(first["after"]) == list(second["after"])
    for name, tensor in first["after"].items():
        assert torch.equal(tensor, second["after"][name]), name
    of_b = [name for name in first["after"] if name.startswith("training_only.network_b.")]
    assert any(not torch.equal(first["after"][name], first["before"][name]) for name in of_b)
    assert first["mode"] == second["mode"] == mode
    assert first["images"] != second["images"]


def test_a_new_stage_is_tried_again_before_two_processes_go_to_split(ranks) -> None:
    for rank in ranks:
        assert rank["out of memory"]["modes"] == ["stacked", "stacked", "split", "split"]
        for name, tensor in rank["out of memory"]["after"].items():
            assert torch.equal(tensor, ranks[0]["out of memory"]["after"][name]), name


# ---- a second network, a teacher ------------------------------------------------------------------------------------


def test_a_second_network_is_in_the_checkpoint_and_learns_by_deep_supervision(made, tmp_path) -> None:
    trainer = made(TwoNetworks)
    labeled, unlabeled, _ = make_batches(trainer)
    state = trainer.training_network.training_state()
    assert {"encoder", "decoder"} <= {n.split(".")[2] for n in state if n.startswith("training_only.network_b.")}
    a, b = trainer.training_network.encoder, trainer.training_network.training_only["network_b"].encoder
    assert any(not torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True)), "drawn apart"
    *_, together = stages_of(trainer)
    assert together == "together"
    _, gradients = testing.gradients_of(trainer, labeled, unlabeled, mode="split")
    # The head of half the resolution learns from the unlabeled images' outputs too.
    heads = [name for name in gradients if "network_b.decoder.seg_layers" in name]
    assert len(heads) == 4 and all(gradients[name].abs().max() > 0 for name in heads)


@pytest.mark.parametrize("predict_with", ["student", "teacher"])
def test_the_default_moves_the_teacher_and_the_setting_says_who_predicts(made, predict_with) -> None:
    trainer = made(MeanTeacher, ema_decay=0.9, predict_with=predict_with)
    network = trainer.training_network
    _, _, batch = make_batches(trainer)
    trainer.train_step(batch)
    before = [p.clone() for p in network.teacher.encoder.parameters()]
    trainer.train_step(batch)
    assert network.teacher.updates == 2
    # min(0.9, 1 - 1 / 2)
    for old, moved, student in zip(
        before, network.teacher.encoder.parameters(), network.encoder.parameters(), strict=True
    ):
        torch.testing.assert_close(moved, 0.5 * old + 0.5 * student.detach())
    source = network.teacher if predict_with == "teacher" else network
    state = network.state_dict()
    for part in ("encoder", "decoder"):
        for name, tensor in getattr(source, part).named_parameters(prefix=part):
            assert torch.equal(tensor, state[name]), name
    with torch.no_grad():
        expected = source.decoder(source.encoder(batch["data"]))[0]
        assert torch.equal(network(batch["data"])[0], expected)


@pytest.mark.parametrize(
    ("predict_with", "other"), [("student", "teacher"), pytest.param("teacher", "student", marks=pytest.mark.slow)]
)
def test_student_and_teacher_are_both_validated(planned_2d, environment, tmp_path, predict_with, other) -> None:
    trainer = make_short(MeanTeacher, planned_2d, tmp_path, predict_with=predict_with, validate_both=True)
    os.environ["nnUNet_def_n_proc"] = "1"
    trainer.inference_allowed_mirroring_axes = (0,)
    with torch.no_grad():  # student and teacher that see opposite classes everywhere
        trainer.training_network.decoder.seg_layers[-1].bias += torch.tensor([50.0, 0.0, 0.0])
        trainer.training_network.teacher.decoder.seg_layers[-1].bias += torch.tensor([0.0, 50.0, 0.0])
    trainer.perform_actual_validation()
    folder = Path(trainer.output_folder)
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["validation", f"validation_{other}"]
    predicted = {
        name: json.loads((folder / name / "summary.json").read_text())["mean"]["1"]["n_pred"]
        for name in ("validation", f"validation_{other}")
    }
    assert (predicted["validation"] > 0) == (predict_with == "teacher")
    assert (predicted[f"validation_{other}"] > 0) == (other == "teacher")
    assert trainer.training_network.predict_with_teacher == (predict_with == "teacher")


def test_out_of_memory_is_tried_in_every_stage_of_one_process(made, monkeypatch) -> None:
    trainer = made(TwoNetworks)
    _, _, batch = make_batches(trainer)
    trainer.step_gradients.memory_mode = "stacked"
    stages = stages_of(trainer)
    next(stages)
    trainer.train_step(batch)
    assert trainer.step_gradients.memory_mode == "stacked"
    next(stages)

    def fail(self):
        raise RuntimeError("FIND was unable to find an engine to execute this computation")

    monkeypatch.setattr(passes_module.StackedOutputs, "finish", fail)
    trainer.train_step(batch)
    assert trainer.step_gradients.memory_mode == "split"
