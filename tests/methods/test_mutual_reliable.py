"""Mutual learning: its loss against a naive transcription of the paper, its gradients, its decoders."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_steps import Given, images_of, make_batches, summed_terms
from method_steps import make_trainer as make_method_trainer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from nnunet_ssl.methods.mutual_reliable import (
    MutualNetwork,
    MutualReliableTrainer,
    cosine_to_prototypes,
    lesson,
    mutual_loss,
    sums_over_members,
)
from nnunet_ssl.networks.streams import Stream, StreamOutput


def make_trainer(planned, monkeypatch, tmp_path, **options) -> MutualReliableTrainer:
    return make_method_trainer(MutualReliableTrainer, planned, monkeypatch, tmp_path, **options)


def random_outputs(trainer, labeled, unlabeled, *, grad=False) -> Given:
    generator = torch.Generator().manual_seed(5)
    channels = trainer.label_manager.num_segmentation_heads
    spatial = unlabeled.weak.shape[2:]
    outputs = Given()
    for name, stream in trainer.streams().items():
        n = 2 if stream.image == "x" else len(unlabeled.weak)
        features = torch.randn(n, 5, *spatial, generator=generator)
        logits = [torch.randn(n, channels, *spatial, generator=generator) * 2]
        if stream.deep_supervision:
            logits += [torch.randn(n, channels, *t.shape[2:], generator=generator) for t in labeled.target[1:]]
        for tensor in [features, *logits]:
            tensor.requires_grad_(grad and stream.gradient)
        outputs[name] = StreamOutput(logits if stream.deep_supervision else logits[0], features)
    return outputs


def naive_learn(z_i, z_j, f_j, *, regions: bool = False, wr=True, hr=True, own=None) -> float:
    """L_i←j in float64, sample by sample, voxel by voxel, class by class; λ_wr compares ``own`` with z_j, or z_i."""
    own = z_i if own is None else own
    z_i, z_j, f_j, own = (tensor.detach().double().numpy() for tensor in (z_i, z_j, f_j, own))

    def probabilities(z):
        return 1 / (1 + np.exp(-z)) if regions else np.exp(z) / np.exp(z).sum()

    def entropy(p):
        return -(p * np.log(p) + (1 - p) * np.log(1 - p)) if regions else np.full(1, -(p * np.log(p)).sum())

    numerator, denominator = 0.0, 0.0
    for sample in range(len(z_i)):
        voxels = list(np.ndindex(z_i.shape[2:]))
        classes = range(z_i.shape[1])

        def predicted(voxel, k, sample=sample):
            z = z_j[(sample, slice(None), *voxel)]
            return probabilities(z)[k] > 0.5 if regions else np.argmax(z) == k

        prototypes = []
        for k in classes:
            members = [f_j[(sample, slice(None), *v)] for v in voxels if predicted(v, k)]
            prototypes.append(np.mean(members, 0) if members else np.zeros(f_j.shape[1]))
        for v in voxels:
            at = (sample, slice(None), *v)
            p_i, p_j, p_own = probabilities(z_i[at]), probabilities(z_j[at]), probabilities(own[at])
            f = f_j[at]
            s = np.array([f @ q / (np.linalg.norm(f) * np.linalg.norm(q)) if q.any() else 0.0 for q in prototypes])
            agreement = 1 - (s - p_j) ** 2
            lambda_hr = np.clip(agreement if regions else agreement.mean(keepdims=True), 0, 1) if hr else 1.0
            lambda_wr = (entropy(p_own) > entropy(p_j)).astype(float) if wr else np.ones_like(entropy(p_own))
            if regions:
                y = (p_j > 0.5).astype(float)
                loss = -(y * np.log(p_i) + (1 - y) * np.log(1 - p_i))
            else:
                loss = -np.log(p_i[np.argmax(p_j)])
            numerator += (lambda_wr * lambda_hr * loss).sum()
            denominator += lambda_wr.sum()
    return numerator / (denominator + 1e-6)


def full(output: StreamOutput) -> torch.Tensor:
    return output.logits[0] if isinstance(output.logits, list) else output.logits


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"decoders": 3}, {"certainty_weight": False, "similarity_weight": False}], ids=str
)
def test_terms_are_the_papers(regions, options, planned_2d, monkeypatch, tmp_path):
    trainer = make_trainer(planned_2d, monkeypatch, tmp_path, regions=regions, **options)
    labeled, unlabeled, _ = make_batches(trainer)
    outputs = random_outputs(trainer, labeled, unlabeled)
    terms = summed_terms(trainer, outputs, labeled, unlabeled)
    names = "abc"[: options.get("decoders", 2)]
    assert set(terms) == set(trainer.loss_weights(0.0))
    for i in names:
        supervised = terms["supervised" if i == "a" else f"supervised_{i}"]
        torch.testing.assert_close(supervised, trainer.loss(outputs[f"x_{i}"].logits, labeled.target))
        for j in names.replace(i, ""):
            by_image = {
                image: naive_learn(
                    full(outputs[f"{image}_{i}"]),
                    full(outputs[f"{image}_{j}"]),
                    outputs[f"{image}_{j}"].features,
                    regions=regions,
                    wr=options.get("certainty_weight", True),
                    hr=options.get("similarity_weight", True),
                )
                for image in "xu"
            }
            # Two labeled and three unlabeled samples.
            assert terms[f"{i}_from_{j}"].item() == pytest.approx(0.4 * by_image["x"] + 0.6 * by_image["u"], rel=1e-4)


@pytest.mark.parametrize("options", [{}, {"decoders": 3}], ids=str)
def test_with_strong_views_decoders_learn_there_what_the_others_teach_on_the_weak_view(
    options, planned_2d, monkeypatch, tmp_path
):
    assert make_trainer(planned_2d, monkeypatch, tmp_path).unlabeled_views().strong == 0
    trainer = make_trainer(planned_2d, monkeypatch, tmp_path, student_view="strong", ramp_length=0.0, **options)
    labeled, unlabeled, batch = make_batches(trainer)
    images = images_of(trainer, labeled, unlabeled)
    assert images["u"] is unlabeled.weak and images["s"] is unlabeled.strong[0]
    outputs = random_outputs(trainer, labeled, unlabeled, grad=True)
    terms = summed_terms(trainer, outputs, labeled, unlabeled)
    for i, j in itertools.permutations("abc"[: options.get("decoders", 2)], 2):
        on_labeled = naive_learn(full(outputs[f"x_{i}"]), full(outputs[f"x_{j}"]), outputs[f"x_{j}"].features)
        on_strong = naive_learn(
            full(outputs[f"s_{i}"]), full(outputs[f"u_{j}"]), outputs[f"u_{j}"].features, own=full(outputs[f"u_{i}"])
        )
        term = terms[f"{i}_from_{j}"]
        assert term.item() == pytest.approx(0.4 * on_labeled + 0.6 * on_strong, rel=1e-4)
        leaves = {name: full(output) for name, output in outputs.items() if full(output).requires_grad}
        found = torch.autograd.grad(term, list(leaves.values()), retain_graph=True, allow_unused=True)
        assert {n for n, g in zip(leaves, found, strict=True) if g is not None} == {f"x_{i}", f"s_{i}"}
    assert trainer.train_step(batch)["loss/a_from_b"] > 0


def test_terms_in_3d_are_the_papers(planned_3d, monkeypatch, tmp_path):
    trainer = make_trainer(planned_3d, monkeypatch, tmp_path)
    labeled, unlabeled, _ = make_batches(trainer)
    outputs = random_outputs(trainer, labeled, unlabeled)
    small = Given(
        {
            name: StreamOutput(full(output)[:, :, 3:7, 4:9, :6], output.features[:, :, 3:7, 4:9, :6])
            for name, output in outputs.items()
        }
    )
    monkeypatch.setattr(trainer, "supervised_loss", lambda output, target: torch.zeros(()))
    terms = summed_terms(trainer, small, labeled, unlabeled)
    expected = [
        naive_learn(full(small[f"{i}_b"]), full(small[f"{i}_a"]), small[f"{i}_a"].features, regions=False) for i in "xu"
    ]
    assert terms["b_from_a"].item() == pytest.approx(0.4 * expected[0] + 0.6 * expected[1], rel=1e-4)


def test_only_the_student_of_a_term_gets_its_gradient(planned_2d, monkeypatch, tmp_path):
    trainer = make_trainer(planned_2d, monkeypatch, tmp_path)
    labeled, unlabeled, _ = make_batches(trainer)
    outputs = random_outputs(trainer, labeled, unlabeled, grad=True)
    terms = summed_terms(trainer, outputs, labeled, unlabeled)
    leaves = {name: full(output) for name, output in outputs.items()}
    leaves |= {f"{name} features": output.features for name, output in outputs.items()}

    def reached(term: str) -> set[str]:
        found = torch.autograd.grad(terms[term], list(leaves.values()), retain_graph=True, allow_unused=True)
        return {n for n, g in zip(leaves, found, strict=True) if g is not None and g.abs().max() > 0}

    assert reached("supervised") == {"x_a"} and reached("supervised_b") == {"x_b"}
    assert reached("a_from_b") == {"x_a", "u_a"} and reached("b_from_a") == {"x_b", "u_b"}


def test_voxels_with_the_ignore_label_are_learned_from_the_other_decoder(planned_2d, monkeypatch, tmp_path):
    trainer = make_trainer(planned_2d, monkeypatch, tmp_path, ignore=True)
    labeled, unlabeled, _ = make_batches(trainer)
    for target in labeled.target:
        target.fill_(3)
    outputs = random_outputs(trainer, labeled, unlabeled, grad=True)
    terms = summed_terms(trainer, outputs, labeled, unlabeled)
    (gradient,) = torch.autograd.grad(terms["a_from_b"], [full(outputs["x_a"])])
    learned = (gradient.abs().sum(1) > 0).float().mean().item()
    assert 0.2 < learned < 0.8


def test_the_log_has_shares_and_reliability_of_each_direction(planned_2d, monkeypatch, tmp_path):
    trainer = make_trainer(planned_2d, monkeypatch, tmp_path)
    labeled, unlabeled, _ = make_batches(trainer)
    summed_terms(trainer, random_outputs(trainer, labeled, unlabeled), labeled, unlabeled)
    assert set(trainer.epoch_log.counts) == {"share/unlabeled", "patches/unlabeled"} | {
        f"{what}/{d}" for what in ("learned", "reliability") for d in ("a_from_b", "b_from_a")
    }
    voxels = 5 * np.prod(trainer.configuration_manager.patch_size)
    learned = [trainer.epoch_log.counts[f"learned/{direction}"] for direction in ("a_from_b", "b_from_a")]
    # Each voxel is learned by the decoder that is less certain there.
    assert sum(counts[0].item() for counts in learned) == voxels == learned[0][1].item()
    count, total = trainer.epoch_log.counts["reliability/a_from_b"]
    assert total == learned[0][0] and 0 < count / total < 1


def test_weights_of_two_and_three_decoders(planned_2d, monkeypatch, tmp_path):
    trainer = make_trainer(planned_2d, monkeypatch, tmp_path)
    ramp = np.exp(-5 * (1 - 0.1 / 0.4) ** 2)
    assert trainer.loss_weights(0.1) == pytest.approx(
        {"supervised": 0.5, "supervised_b": 0.5, "a_from_b": ramp, "b_from_a": ramp}
    )
    assert trainer.loss_weights(0.4)["a_from_b"] == 1
    trainer = make_trainer(planned_2d, monkeypatch, tmp_path, decoders=3, mutual_weight=0.6, supervised_weight=0.25)
    weights = trainer.loss_weights(1.0)
    assert len(weights) == 9 and weights["c_from_a"] == pytest.approx(0.3) and weights["supervised_c"] == 0.25


def test_streams_are_the_papers(planned_2d, monkeypatch, tmp_path):
    assert make_trainer(planned_2d, monkeypatch, tmp_path).streams() == {
        "x_a": Stream("x", deep_supervision=True, features=True),
        "x_b": Stream("x", decoder="b", deep_supervision=True, features=True),
        "u_a": Stream("u", features=True),
        "u_b": Stream("u", decoder="b", features=True),
    }


@pytest.mark.parametrize(
    ("upsampling", "modes"), [("linear", ("bilinear", "nearest")), ("nearest", ("nearest", "bilinear"))]
)
def test_decoders_interpolate_and_have_weights_of_their_own(upsampling, modes, planned_2d, monkeypatch, tmp_path):
    trainer = make_trainer(planned_2d, monkeypatch, tmp_path, decoders=3, upsampling=upsampling)
    network = trainer.training_network
    for name, mode in zip("bc", modes, strict=True):
        decoder = network.training_only[f"decoder_{name}"]
        upsamples = [m for m in decoder.modules() if isinstance(m, nn.Upsample)]
        assert len(upsamples) == 2 and {m.mode for m in upsamples} == {mode}
        for mine, theirs in zip(decoder.stages.parameters(), network.decoder.stages.parameters(), strict=True):
            if mine.ndim > 1:
                assert not torch.equal(mine, theirs)


def test_prediction_is_decoder_as_and_validation_may_average(planned_2d, monkeypatch, tmp_path):
    for regions in (False, True):
        trainer = make_trainer(planned_2d, monkeypatch, tmp_path, regions=regions, validate_with="mean")
        network = trainer.training_network
        assert isinstance(network, MutualNetwork)
        trainer.set_deep_supervision_enabled(False)
        image = torch.randn(2, 1, *trainer.configuration_manager.patch_size)
        skips = network.encoder(image)
        a, b = network.decoder(skips), network.training_only["decoder_b"](skips)
        assert torch.equal(network(image), a)
        network.average = True
        activate = torch.sigmoid if regions else lambda z: z.softmax(1)
        torch.testing.assert_close(activate(network(image)), (activate(a) + activate(b)) / 2)


def test_the_mean_is_for_the_validation_after_the_training_alone(planned_2d, monkeypatch, tmp_path):
    seen = []
    base = MutualReliableTrainer.__mro__[1]
    monkeypatch.setattr(
        base, "perform_actual_validation", lambda self, save: seen.append(self.training_network.average), raising=False
    )
    for validate_with in ("mean", "decoder_a"):
        trainer = make_trainer(planned_2d, monkeypatch, tmp_path, validate_with=validate_with)
        trainer.perform_actual_validation()
        assert trainer.training_network.average is False
    assert seen == [True, False]


@given(st.integers(0, 10_000), st.booleans(), st.sampled_from([(4, 5), (2, 3, 4)]))
@settings(max_examples=30)
def test_a_lesson_is_bounded_and_carries_no_gradient(seed, regions, spatial):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(2, 3, *spatial, generator=generator) * 30).requires_grad_()
    features = torch.randn(2, 4, *spatial, generator=generator).requires_grad_()
    found = lesson(logits, features, regions=regions)
    channels = 3 if regions else 1
    assert found.entropy.shape == found.reliability.shape == (2, channels, *spatial)
    assert not any(tensor.requires_grad for tensor in found)
    assert found.reliability.min() >= 0 and found.reliability.max() <= 1
    assert found.entropy.min() >= -1e-5 and found.entropy.max() <= np.log(2 if regions else 3) + 1e-5


def test_prototypes_are_per_sample_and_the_cosine_is_one_where_features_agree():
    features = torch.zeros(2, 2, 1, 4)
    features[0, 0], features[1, 1] = 3.0, 0.5
    members = torch.zeros(2, 3, 1, 4, dtype=torch.bool)
    members[:, 0, :, :2] = True
    members[:, 1, :, 2:] = True
    similarity = cosine_to_prototypes(features, members)
    torch.testing.assert_close(similarity[:, :2], torch.ones(2, 2, 1, 4))
    assert torch.equal(similarity[:, 2], torch.zeros(2, 1, 4))  # a class without voxels


@pytest.mark.parametrize("voxels", [5, 255, 256, 257, 256 * 4, 10_000])
def test_sums_in_parts_are_the_sums(voxels):
    generator = torch.Generator().manual_seed(voxels)
    features = torch.randn(2, 5, voxels, generator=generator)
    members = (torch.rand(2, 3, voxels, generator=generator) < 0.3).float()
    expected = torch.einsum("bkv,bfv->bkf", members.double(), features.double()).float()
    for parts in (1, 256):
        torch.testing.assert_close(
            sums_over_members(features, members, parts=parts), expected, rtol=1e-5, atol=1e-6 * voxels
        )


def test_on_a_gpu_no_product_is_of_all_voxels():
    """Shapes without content, since there may be no GPU."""
    products = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.bmm.default:
                products.append(args[0].shape)
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(), Products():
        features = torch.empty(2, 32, 64, 64, 48, device="cuda")
        found = cosine_to_prototypes(features, torch.empty(2, 2, 64, 64, 48, device="cuda", dtype=torch.bool))
    assert found.shape == (2, 2, 64, 64, 48)
    assert sorted(map(tuple, products)) == [(2, 2, 32), (256, 2, 768), (256, 2, 768)]


def test_features_of_half_precision_are_summed_in_single():
    features = torch.full((1, 2, 300, 300), 3.0, dtype=torch.float16)  # their sum is beyond 65504
    with torch.autocast("cpu", dtype=torch.float16):
        found = lesson(torch.zeros(1, 2, 300, 300, dtype=torch.float16), features, regions=False)
    assert torch.isfinite(found.reliability).all()


def test_a_batch_with_nothing_to_learn_has_no_loss():
    logits = torch.randn(1, 2, 3, 3, requires_grad=True)
    nothing = torch.zeros(1, 1, 3, 3, dtype=torch.bool)
    loss = mutual_loss(logits, torch.zeros(1, 1, 3, 3, dtype=torch.int64), nothing, torch.ones(1, 1, 3, 3))
    loss.backward()
    assert loss == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


def test_hand_computed():
    # Two voxels; the student learns the first, with reliability one half: the mean is over what is learned.
    logits = torch.tensor([[[0.0, 7.0]], [[0.0, -7.0]]]).permute(1, 0, 2)[..., None]
    certain = torch.tensor([True, False]).view(1, 1, 2, 1)
    reliable = torch.tensor([0.5, 1.0]).view(1, 1, 2, 1)
    loss = mutual_loss(logits, torch.ones(1, 1, 2, 1, dtype=torch.int64), certain, reliable)
    assert loss.item() == pytest.approx(0.5 * np.log(2), rel=1e-5)
