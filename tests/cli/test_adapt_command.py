from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from nnssl_checkpoint import nnssl_checkpoint
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from tiny_dataset import PLANS
from torch import nn

from nnunet_ssl.cli.main import main
from nnunet_ssl.networks.training_network import TrainingNetwork
from nnunet_ssl.testing.tiny import unet
from nnunet_ssl.trainer_lookup import RECOMMENDED

ARCHITECTURES = {
    "ResidualEncoderUNet": {"n_blocks_per_stage": [1, 2, 1]},
    "PlainConvUNet": {"n_conv_per_stage": [2, 2, 2]},
}


def architecture(name: str, **changes) -> dict:
    return unet([4, 6, 8], name=name, **{**ARCHITECTURES.get(name, {}), **changes})


def build(plan: dict, channels: int, classes: int = 3) -> nn.Module:
    return get_network_from_plans(
        plan["network_class_name"], plan["arch_kwargs"], plan["_kw_requires_import"], channels, classes,
        deep_supervision=True,
    )  # fmt: skip


class Dataset:
    """A planned dataset; ``channels`` images per case."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.folder = home / "preprocessed" / "Dataset007_Tiny"
        self.folder.mkdir(parents=True)
        self.write(channels=1)

    def write(self, channels: int, **plans: dict) -> None:
        names = {str(channel): "MRI" for channel in range(channels)}
        labels = {"background": 0, "a": 1, "b": 2}
        description = {"channel_names": names, "labels": labels, "file_ending": ".nii.gz"}
        (self.folder / "dataset.json").write_text(json.dumps(description))
        for name, plan in ({key: architecture(key) for key in ARCHITECTURES} | plans).items():
            configuration = {
                "spacing": [2.0, 1.0, 1.0],
                "patch_size": [16, 16, 16],
                "normalization_schemes": ["CTNormalization"],
                "architecture": plan,
            }
            written = {**PLANS, "configurations": {"3d_fullres": configuration}}
            (self.folder / f"{name}.json").write_text(json.dumps(written))

    def adapt(self, checkpoint: dict | Path, plans: str, *options: str) -> int:
        file = checkpoint if isinstance(checkpoint, Path) else self.home / "nnssl.pth"
        if isinstance(checkpoint, dict):
            torch.save(checkpoint, file)
        given = ["-i", str(file), "-d", "7", "-c", "3d_fullres", "-p", plans, "-o", str(self.output), *options]
        return main(["adapt", *given])

    @property
    def output(self) -> Path:
        return self.home / "new" / "start.pth"


@pytest.fixture
def dataset(tmp_path, monkeypatch) -> Dataset:
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    return Dataset(tmp_path)


@pytest.mark.parametrize("prefix", ["encoder.", ""])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_nnunet_starts_from_the_pretrained_encoder(dataset, name, channels, prefix, capsys):
    dataset.write(channels)
    pretrained = build(architecture(name), 1, classes=1)
    assert dataset.adapt(nnssl_checkpoint(pretrained, prefix=prefix), name) == 0
    assert set(torch.load(dataset.output, weights_only=True)) == {"network_weights"}
    assert list(dataset.output.parent.iterdir()) == [dataset.output]

    network = build(architecture(name), channels)
    heads = copy.deepcopy(network.decoder.seg_layers.state_dict())
    decoder = copy.deepcopy(network.decoder.stages.state_dict())
    training = TrainingNetwork(network, teacher=True)
    load_pretrained_weights(training, str(dataset.output))
    inputs = {f"{key}.weight".removeprefix("encoder.") for key in network.keys_to_in_proj}
    found, expected = training.encoder.state_dict(), pretrained.encoder.state_dict()
    assert list(found) == list(expected)
    for key, tensor in expected.items():
        if key in inputs:
            assert found[key].shape[1] == channels
            assert torch.allclose(found[key].sum(1, keepdim=True), tensor), "an image in all channels gives the same"
            assert all(torch.equal(found[key][:, :1], found[key][:, [c]]) for c in range(channels))
        else:
            assert torch.equal(found[key], tensor), key
    teacher = training.teacher.encoder.state_dict()
    assert all(torch.equal(teacher[key], tensor) for key, tensor in found.items())
    # Neither the decoder of the pretraining nor the one that the trainer drew.
    for key, tensor in training.decoder.stages.state_dict().items():
        if key.endswith("conv.weight"):
            assert not torch.equal(tensor, pretrained.decoder.stages.state_dict()[key])
            assert not torch.equal(tensor, decoder[key]) and 0 < tensor.std() < 1
    assert all(torch.equal(heads[key], tensor) for key, tensor in training.decoder.seg_layers.state_dict().items())

    printed = capsys.readouterr().out
    assert "Pretrained with spacing [1.0, 1.0, 1.0], ZScoreNormalization, patches of [160, 160, 160]; " in printed
    assert f"{name} 3d_fullres has spacing [2.0, 1.0, 1.0], CTNormalization, patches of [16, 16, 16]\n" in printed
    assert f"-p {name} -tr {RECOMMENDED} -pretrained_weights {dataset.output}\n" in printed


def test_plans_can_name_the_checkpoint(dataset, capsys):
    """As those of nnUNetv2_preprocess_like_nnssl do, which nnU-Net has after 2.8.1."""
    name, file = "ResidualEncoderUNet", dataset.home / "nnssl.pth"
    pretrained = build(architecture(name), 1)
    torch.save(nnssl_checkpoint(pretrained), file)
    plans = json.loads((dataset.folder / f"{name}.json").read_text())
    information = {"checkpoint_path": str(file), "checkpoint_name": "mae", "key_to_encoder": "encoder.stages"}
    for named, status in (({"pretrain_info": information}, 0), ({"pretrain_info": {}}, 2), ({}, 2)):
        (dataset.folder / "ptPlans__mae.json").write_text(json.dumps(plans | named))
        given = ["-d", "7", "-c", "3d_fullres", "-p", "ptPlans__mae", "-o", str(dataset.output)]
        assert main(["adapt", *given]) == status
        printed = capsys.readouterr()
        if status:
            assert "The plans ptPlans__mae name no pretrained checkpoint. Name one of nnssl with -i." in printed.err
        else:
            assert f"encoder and stem of {file}" in printed.out
            weights = torch.load(dataset.output, weights_only=True)["network_weights"]
            assert all(
                torch.equal(weights[f"encoder.{key}"], one) for key, one in pretrained.encoder.state_dict().items()
            )
            dataset.output.unlink()


def test_nnunet_itself_refuses_an_encoder_alone(dataset):
    """What this command is for, and what a user sees who does without."""
    checkpoint = nnssl_checkpoint(build(architecture("ResidualEncoderUNet"), 1), prefix="")
    file = dataset.home / "nnssl.pth"
    torch.save(checkpoint, file)
    training = TrainingNetwork(build(architecture("ResidualEncoderUNet"), 1))
    with pytest.raises(AssertionError, match=r"Key encoder\.\S+ is missing in the pretrained model weights"):
        load_pretrained_weights(training, str(file))


def test_an_encoder_of_another_architecture_is_refused(dataset, capsys):
    for changes in (
        {"features_per_stage": [4, 8, 16]},
        {"n_blocks_per_stage": [1, 1, 1]},
        {"n_blocks_per_stage": [1, 2, 2]},
        {"kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]]},
    ):
        pretrained = build(architecture("ResidualEncoderUNet", **changes), 1)
        assert dataset.adapt(nnssl_checkpoint(pretrained), "ResidualEncoderUNet") == 2
        error = capsys.readouterr().err
        assert "its encoder (ResEncL) is not that of the plans (ResidualEncoderUNet)" in error and "such as" in error
        assert not dataset.output.exists()
    assert "encoder.stem.convs.0.conv.weight is (4, 1, 1, 3, 3) there and (4, 1, 3, 3, 3) here" in error

    assert dataset.adapt(nnssl_checkpoint(build(architecture("ResidualEncoderUNet"), 1)), "PlainConvUNet") == 2
    assert "is not that of the plans (PlainConvUNet)" in capsys.readouterr().err


def test_several_pretrained_channels_do_not_fit_fewer(dataset, capsys):
    assert dataset.adapt(nnssl_checkpoint(build(architecture("PlainConvUNet"), 2)), "PlainConvUNet") == 2
    assert "is (4, 2, 3, 3, 3) there and (4, 1, 3, 3, 3) here" in capsys.readouterr().err


def test_a_transformer_is_refused(dataset, capsys):
    checkpoint = nnssl_checkpoint(build(architecture("ResidualEncoderUNet"), 1), architecture="PrimusM")
    checkpoint["nnssl_adaptation_plan"] |= {"key_to_encoder": "eva", "key_to_stem": "down_projection"}
    assert dataset.adapt(checkpoint, "ResidualEncoderUNet") == 2
    assert "its encoder (PrimusM) is not that of the plans (ResidualEncoderUNet)" in capsys.readouterr().err


def test_plans_of_an_unsupported_network_are_refused(dataset, capsys):
    primus = {
        "network_class_name": "dynamic_network_architectures.architectures.primus.Primus",
        "arch_kwargs": {
            "embed_dim": 48, "patch_embed_size": [8, 8, 8], "eva_depth": 1, "eva_numheads": 2,
            "input_shape": [16, 16, 16],
        },
        "_kw_requires_import": [],
    }  # fmt: skip
    dataset.write(1, primusPlans=primus)
    assert dataset.adapt(nnssl_checkpoint(build(architecture("PlainConvUNet"), 1)), "primusPlans") == 2
    error = capsys.readouterr().err
    assert "make a Primus. Supported are PlainConvUNet and ResidualEncoderUNet" in error


class Unpickled:
    """What torch.load would run if it were asked for more than tensors and plain values."""

    def __reduce__(self):
        return print, ("this code was run",)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"network_weights": {}}, "no nnssl_adaptation_plan"),
        ({"nnssl_adaptation_plan": {}}, "no nnssl_adaptation_plan"),
        ({"network_weights": {}, "init_args": Unpickled()}, "could not be read as tensors and plain values"),
        (
            {"trainer_name": "nnUNetTrainer", "x": Unpickled()},
            "nnUNetTrainer wrote it. A checkpoint of nnU-Net goes",
        ),
    ],
    ids=["nnU-Net's", "no weights", "code", "nnU-Net's with objects"],
)
def test_other_files_are_refused(dataset, capsys, content, expected):
    assert dataset.adapt(content, "ResidualEncoderUNet") == 2
    captured = capsys.readouterr()
    assert expected in captured.err and "this code was run" not in captured.out


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["-i", "no_such.pth"], "no_such.pth could not be opened"),
        (["-c", "2d"], "has no configuration 2d; it has 3d_fullres"),
        (["-p", "nnUNetPlans"], "PlainConvUNet, ResidualEncoderUNet"),
        (["-d", "8"], "ID 8"),
        (["-d", "Tiny"], "Tiny"),
        (["-o", "."], "is there already"),
    ],
)
def test_mistakes_are_explained(dataset, capsys, options, expected):
    checkpoint = nnssl_checkpoint(build(architecture("PlainConvUNet"), 1))
    assert dataset.adapt(checkpoint, "PlainConvUNet", *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("nnunet-ssl adapt: error: ") and expected in error


def test_a_place_that_cannot_be_written_is_named(dataset, capsys):
    (dataset.home / "file").touch()
    checkpoint = nnssl_checkpoint(build(architecture("PlainConvUNet"), 1))
    assert dataset.adapt(checkpoint, "PlainConvUNet", "-o", str(dataset.home / "file" / "start.pth")) == 2
    error = capsys.readouterr().err
    assert "start.pth cannot be written: " in error and "Choose another place with -o" in error


def test_needs_nnunet_preprocessed(dataset, monkeypatch, capsys):
    monkeypatch.delenv("nnUNet_preprocessed")
    assert dataset.adapt({}, "PlainConvUNet") == 2
    assert "nnUNet_preprocessed is not set" in capsys.readouterr().err
