"""``nnunet-ssl plan-small``: what it adds to plans of nnU-Net's planner, and that its networks run."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl.cli.main import main
from nnunet_ssl.testing.tiny import unet

# As nnU-Net's planners write them for the left atrium, ACDC (thick slices) and 2D, without what is not read here.
ATRIUM = ([48, 80, 96], [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2], [1, 2, 2]])
THICK = ([10, 128, 112], [[1, 1, 1], [1, 2, 2], [2, 2, 2], [1, 2, 2], [1, 2, 2]])
FLAT = ([512, 448], [[1, 1], [2, 2], [2, 2], [2, 2], [2, 2], [2, 2]])
FLAT_RESIDUAL = ([80, 96], [[1, 1], [2, 2], [2, 2]])


def planned(patch: list[int], strides: list[list[int]], *, residual: bool = False) -> dict[str, Any]:
    stages, dim = len(strides), len(patch)
    kernels = [[1 if dim == 3 and stage == 0 and patch[0] < 20 else 3, *[3] * (dim - 1)] for stage in range(stages)]
    features = [min(32 * 2**stage, 320) for stage in range(stages)]
    if residual:
        blocks = {"n_blocks_per_stage": [1, 3, 4, 6, 6, 6][:stages]}
    else:
        blocks = {"n_conv_per_stage": [2] * stages, "n_conv_per_stage_decoder": [2] * (stages - 1)}
    name = "ResidualEncoderUNet" if residual else "PlainConvUNet"
    return {
        "data_identifier": "nnUNetPlans_data",
        "batch_size": 49 if dim == 2 else 2,
        "patch_size": patch,
        "architecture": unet(features, dim=dim, name=name, kernel_sizes=kernels, strides=strides, **blocks),
    }


@pytest.fixture
def plans_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    configurations: dict[str, Any] = {
        "2d": planned(*FLAT),
        "3d_fullres": planned(*ATRIUM),
        "3d_thick": planned(*THICK),
        "3d_lowres": planned(*ATRIUM) | {"next_stage": "3d_cascade_fullres"},
        "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
        "residual": planned(*ATRIUM, residual=True),
        "2d_residual": planned(*FLAT_RESIDUAL, residual=True),
        "child": {"inherits_from": "3d_fullres", "batch_size": 1},
        "of_itself": {"inherits_from": "of_itself"},
        "primus": planned(*ATRIUM),
        "without_strides": planned(*ATRIUM),
        "unfinished": {"patch_size": [8, 8, 8]},
    }
    architecture = configurations["primus"]["architecture"]
    architecture["network_class_name"] = "dynamic_network_architectures.architectures.primus.Primus"
    configurations["without_strides"]["architecture"]["arch_kwargs"]["strides"] = 2
    plans = {
        "dataset_name": "Dataset007_Small",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "foreground_intensity_properties_per_channel": {},
        "configurations": configurations,
    }
    file = tmp_path / "nnUNet_preprocessed" / "Dataset007_Small" / "nnUNetPlans.json"
    file.parent.mkdir()
    file.write_text(json.dumps(plans))
    return file


def add(*arguments: str) -> int:
    return main(["plan-small", "-d", "7", *arguments])


@pytest.mark.parametrize(
    ("parent", "name", "patch_size", "batch_size"),
    [
        ("3d_fullres", "3d_small", [16, 32, 40], 2),
        ("3d_thick", "3d_small", [6, 72, 64], 2),
        ("3d_lowres", "3d_small", [16, 32, 40], 2),
        ("child", "3d_small", [16, 32, 40], 1),
        ("residual", "3d_small", [16, 32, 40], 2),
        ("2d", "2d_small", [136, 112], 12),
        ("2d_residual", "2d_small", [80, 96], 12),
    ],
)
def test_a_small_network_runs_with_its_patch(plans_file, parent, name, patch_size, batch_size):
    before = json.loads(plans_file.read_text())
    assert add("-c", parent) == 0
    plans = json.loads(plans_file.read_text())
    added = plans["configurations"].pop(name)
    assert plans == before, "everything else stays"

    plans["configurations"][name] = added
    small = PlansManager(plans).get_configuration(name)
    assert small.patch_size == patch_size and small.batch_size == batch_size
    assert small.data_identifier == "nnUNetPlans_data" and not small.next_stage_names
    assert math.prod(patch_size) <= {2: 128**2, 3: 32**3}[len(patch_size)]
    network = get_network_from_plans(
        small.network_arch_class_name, small.network_arch_init_kwargs, small.network_arch_init_kwargs_req_import, 1, 3,
        deep_supervision=False,
    )  # fmt: skip
    assert network(torch.zeros(1, 1, *patch_size)).shape == (1, 3, *patch_size)
    assert sum(weights.numel() for weights in network.parameters()) < 500_000
    kernel = before["configurations"].get(parent, {}).get("architecture", {}).get("arch_kwargs", {}).get("kernel_sizes")
    assert kernel is None or small.network_arch_init_kwargs["kernel_sizes"] == kernel[:4]


def test_it_says_what_was_added_and_what_comes_next(plans_file, capsys):
    assert add() == 0
    printed = capsys.readouterr().out
    assert f"Added 3d_small to {plans_file}. It uses the preprocessed data of 3d_fullres." in printed
    rows = [line.split("  ") for line in printed.splitlines()]
    assert ["patch", "48 x 80 x 96", "16 x 32 x 40"] in [[cell.strip() for cell in row if cell] for row in rows]
    assert "less accurate than 3d_fullres" in printed
    assert printed.splitlines()[-3:] == [
        "  nnUNetv2_preprocess -d 7 -c 3d_fullres",
        "  nnUNetv2_train 7 3d_small 0 -tr nnUNetTrainer_10epochs -device cpu",
        "  nnUNetv2_train 7 3d_small 0 -tr UniMatchTrainer_10epochs -device cpu",
    ]


def test_a_second_time_changes_nothing(plans_file, capsys):
    assert add() == 0
    first = plans_file.read_bytes()
    plans_file.chmod(0o400)
    (plans_file.parent / "nnUNetPlans_data").mkdir()
    capsys.readouterr()
    assert add() == 0
    printed = capsys.readouterr().out
    assert "has this 3d_small already; nothing has changed." in printed and plans_file.read_bytes() == first
    assert "nnUNetv2_preprocess" not in printed, "the data are there"
    assert add("-c", "2d", "--name", "my_small-1.0") == 0
    assert "my_small-1.0" in json.loads(plans_file.read_text())["configurations"]


def test_other_plans_are_named_in_the_commands(plans_file, capsys):
    shutil.copy(plans_file, plans_file.with_name("mine.json"))
    before = plans_file.read_bytes()
    assert add("-p", "mine") == 0
    printed = capsys.readouterr().out
    assert "nnUNetv2_preprocess -d 7 -c 3d_fullres -plans_name mine" in printed
    assert "nnUNetv2_train 7 3d_small 0 -p mine -tr" in printed
    assert plans_file.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-c", "3d_fulres"], "no configuration 3d_fulres; configurations there: 2d, 3d_fullres"),
        (["-c", "3d_cascade_fullres"], "is the second stage of a cascade"),
        (["-c", "of_itself"], "Configuration of_itself cannot be read"),
        (["-c", "unfinished"], "Configuration unfinished cannot be read"),
        (["-c", "primus"], "make a Primus. Supported are"),
        (["-c", "without_strides"], "without_strides has strides = 2"),
        (["--name", "2d"], "another configuration of the name 2d. Choose another name with --name."),
        (["--name", "a__b"], "--name is 'a__b'"),
        (["--name", "../a"], "--name is '../a'"),
        (["-p", "none"], "Choose with -p"),
    ],
)
def test_what_cannot_be_done_is_refused(plans_file, capsys, arguments, message):
    before = plans_file.read_bytes()
    assert add(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("nnunet-ssl plan-small: error: ") and message in error and error.count("\n") == 1
    assert plans_file.read_bytes() == before


def test_the_name_of_a_configuration_that_was_edited(plans_file, capsys):
    assert add() == 0
    edited = json.loads(plans_file.read_text())
    edited["configurations"]["3d_small"]["batch_size"] = 4
    plans_file.write_text(json.dumps(edited))
    assert add() == 2
    assert "another configuration of the name 3d_small" in capsys.readouterr().err
    assert json.loads(plans_file.read_text()) == edited
