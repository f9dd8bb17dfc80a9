from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path, PurePosixPath

import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.network_architecture.nnUNetTrainerBN import nnUNetTrainerBN
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl.cli.lookup import trainers_folder
from nnunet_ssl.cli.main import main
from nnunet_ssl.methods.crossmatch import CrossMatchTrainer
from nnunet_ssl.methods.simcvd import SimCVDTrainer

DATASET = "Dataset998_Phantoms"
OTHER_TRAINERS = """
from nnunet_ssl.methods.crossmatch import CrossMatchTrainer
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.network_architecture.nnUNetTrainerBN import nnUNetTrainerBN


class BatchNormCrossMatchTrainer(CrossMatchTrainer, nnUNetTrainerBN):
    pass


class OwnNetworkTrainer(CrossMatchTrainer):
    @staticmethod
    def build_network_architecture(plans_manager, *arguments):
        return nnUNetTrainer.build_network_architecture(plans_manager, *arguments)
"""


@pytest.fixture(scope="module")
def trained(planned_3d, tmp_path_factory):
    """A folder nnUNet_results with checkpoints as the trainers write them, and the trainers by folder."""
    results = tmp_path_factory.mktemp("trained")
    plans = json.loads((planned_3d.preprocessed / "nnUNetPlans.json").read_text())
    plans["configurations"]["tiny"]["semi_supervised"] = {"ramp_length": 0.2}
    plans["configurations"]["tiny_teacher"] = {
        "inherits_from": "tiny",
        "semi_supervised": {"predict_with": "teacher"},
    }
    dataset_json = json.loads((planned_3d.preprocessed / "dataset.json").read_text())
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        _set_folders(patch, planned_3d, results)
        for trainer_class, configuration, fold in (
            (SimCVDTrainer, "tiny", 0),
            (SimCVDTrainer, "tiny", 1),
            (SimCVDTrainer, "tiny_teacher", "all"),
            (CrossMatchTrainer, "tiny", 0),
        ):
            given = {**json.loads(json.dumps(plans)), "continue_training": False}
            trainer = trainer_class(given, configuration, fold, dataset_json, torch.device("cpu"))
            trainer.initialize()
            trainer.inference_allowed_mirroring_axes = (0, 2)
            if trainer_class is SimCVDTrainer:
                with torch.no_grad():
                    for number, parameter in enumerate(trainer.training_network.teacher.parameters()):
                        parameter.fill_(number)
            for name in ("checkpoint_final.pth", "checkpoint_best.pth"):
                trainer.save_checkpoint(f"{trainer.output_folder}/{name}")
            model = Path(trainer.output_folder_base)
            (model / "plans.json").write_text(json.dumps(plans))
            for name in ("dataset.json", "dataset_fingerprint.json"):
                shutil.copy(planned_3d.preprocessed / name, model)
            made[f"{model.name}/fold_{fold}"] = trainer
    return results, made


def _set_folders(patch, planned, results) -> None:
    for name, value in planned.environment.items():
        if name.startswith("nnUNet"):
            patch.setenv(name, value)
    patch.setenv("nnUNet_results", str(results))


@pytest.fixture
def results(trained, planned_3d, monkeypatch, tmp_path):
    """The checkpoints; tests that spoil them get their own copy with :func:`copy_of`."""
    (tmp_path / "trainers").mkdir()
    (tmp_path / "trainers" / "others.py").write_text(OTHER_TRAINERS)
    _set_folders(monkeypatch, planned_3d, trained[0])
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join([str(trainers_folder()), str(tmp_path / "trainers")]))
    return trained[0]


@pytest.fixture
def copied(results, monkeypatch, tmp_path):
    copy = tmp_path / "results"
    shutil.copytree(results, copy)
    monkeypatch.setenv("nnUNet_results", str(copy))
    return copy / DATASET


def export(output: Path, *options: str, trainer: str = "SimCVDTrainer", configuration: str = "tiny") -> int:
    return main(["export", "-d", "998", "-c", configuration, "-tr", trainer, "-o", str(output), *options])


def weights_of(network) -> dict[str, torch.Tensor]:
    """What nnU-Net's own network would call them, from encoder and decoder alone."""
    stock = torch.nn.Module()
    stock.encoder, stock.decoder = network.encoder, network.decoder
    return stock.state_dict()


def assert_same(first: dict, second: dict) -> None:
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_zip_holds_what_stock_nnunet_needs_and_nothing_else(results, trained, tmp_path, capsys):
    output = tmp_path / "new" / "model.zip"
    assert export(output, "-f", "0", "1") == 0
    with zipfile.ZipFile(output) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "installed")
    for name in names:
        path = PurePosixPath(name)
        assert not path.is_absolute() and ".." not in path.parts and "\\" not in name and ":" not in name
    model = f"{DATASET}/nnUNetTrainer__nnUNetPlans__tiny"
    files = {"plans.json", "dataset.json", "dataset_fingerprint.json"}
    files |= {f"fold_{fold}/checkpoint_final.pth" for fold in (0, 1)}
    assert set(names) == {f"{model}/{file}" for file in files}
    assert [path.name for path in output.parent.iterdir()] == ["model.zip"]

    installed = tmp_path / "installed" / model
    for fold in (0, 1):
        file = installed / f"fold_{fold}" / "checkpoint_final.pth"
        checkpoint = torch.load(file, weights_only=True)
        assert set(checkpoint) == {
            "network_weights", "trainer_name", "init_args", "inference_allowed_mirroring_axes"
        }  # fmt: skip
        assert checkpoint["trainer_name"] == "nnUNetTrainer"
        assert checkpoint["init_args"]["configuration"] == "tiny" and checkpoint["init_args"]["fold"] == fold
        assert checkpoint["inference_allowed_mirroring_axes"] == (0, 2)
        trainer = trained[1][f"SimCVDTrainer__nnUNetPlans__tiny/fold_{fold}"]
        assert_same(checkpoint["network_weights"], weights_of(trainer.training_network))
        ours = results / DATASET / "SimCVDTrainer__nnUNetPlans__tiny" / f"fold_{fold}" / "checkpoint_final.pth"
        assert file.stat().st_size < 0.6 * ours.stat().st_size
        assert b"semi_supervised" not in file.read_bytes()
    assert "semi_supervised" not in (installed / "plans.json").read_text()
    assert json.loads((installed / "plans.json").read_text())["configurations"]["tiny"]["patch_size"] == [12, 16, 20]

    printed = capsys.readouterr().out
    assert "  nnUNetv2_install_pretrained_model_from_zip model.zip\n" in printed
    assert f"  nnUNetv2_predict -d {DATASET} -c tiny -p nnUNetPlans -tr nnUNetTrainer -i IN -o OUT -f 0 1\n" in printed
    assert "Fold 1: the student's weights" in printed


def test_nnunet_reads_an_exported_folder(results, trained, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    assert export(tmp_path / "out", "-f", "0", trainer="CrossMatchTrainer") == 0
    model = tmp_path / "out" / DATASET / "nnUNetTrainer__nnUNetPlans__tiny"
    command = f"nnUNetv2_predict_from_modelfolder -m out/{model.parent.name}/{model.name} -i IN -o OUT -f 0\n"
    assert command in capsys.readouterr().out
    assert [path.name for path in tmp_path.glob("*out*")] == ["out"], "nothing else is left behind"

    trainer = trained[1]["CrossMatchTrainer__nnUNetPlans__tiny/fold_0"]
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (0,))
    assert predictor.trainer_name == "nnUNetTrainer" and predictor.allowed_mirroring_axes == (0, 2)
    assert_same(predictor.network.state_dict(), weights_of(trainer.training_network))

    # What -pretrained_weights does.
    with torch.no_grad():
        for parameter in predictor.network.parameters():
            parameter.zero_()
    load_pretrained_weights(predictor.network, str(model / "fold_0" / "checkpoint_final.pth"))
    assert_same(
        {name: value for name, value in predictor.network.state_dict().items() if "seg_layers" not in name},
        {name: value for name, value in weights_of(trainer.training_network).items() if "seg_layers" not in name},
    )


@pytest.mark.parametrize("fold", ["0", "all"])
@pytest.mark.parametrize("weights", [None, "student", "teacher"])
def test_student_and_teacher(results, trained, tmp_path, capsys, fold, weights):
    """Fold all is of a checkpoint that predicts with the teacher, fold 0 of one that predicts with the student."""
    configuration, predicts = {"0": ("tiny", "student"), "all": ("tiny_teacher", "teacher")}[fold]
    options = [] if weights is None else ["--weights", weights]
    assert export(tmp_path / "out", "-f", fold, *options, configuration=configuration) == 0
    assert f"Fold {fold}: the {weights or predicts}'s weights" in capsys.readouterr().out
    (file,) = (tmp_path / "out").rglob("checkpoint_final.pth")
    network = trained[1][f"SimCVDTrainer__nnUNetPlans__{configuration}/fold_{fold}"].training_network
    expected = network.teacher if (weights or predicts) == "teacher" else network
    assert_same(torch.load(file, weights_only=True)["network_weights"], weights_of(expected))


def test_another_checkpoint_keeps_its_name(results, tmp_path, capsys):
    assert export(tmp_path / "model.zip", "-f", "0", "-chk", "checkpoint_best.pth") == 0
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        assert [name for name in archive.namelist() if name.endswith("/fold_0/checkpoint_best.pth")]
    assert "-f 0 -chk checkpoint_best.pth\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "there"),
    [
        (["-f", "0", "1"], True),
        (["-f", "0", "1", "--weights", "student"], True),
        (["-f", "0", "1", "--weights", "teacher"], False),
        (["-f", "0", "1", "-chk", "checkpoint_best.pth"], False),
        (["-f", "0"], False),
    ],
)
def test_postprocessing_goes_with_the_networks_that_it_was_chosen_for(copied, tmp_path, options, there):
    folder = "crossval_results_folds_0_1"
    (copied / "SimCVDTrainer__nnUNetPlans__tiny" / folder).mkdir()
    for name in ("postprocessing.pkl", "postprocessing.json", "summary.json"):
        (copied / "SimCVDTrainer__nnUNetPlans__tiny" / folder / name).write_text(name)
    assert export(tmp_path / "out", *options) == 0
    found = {path.name: path.read_text() for path in (tmp_path / "out").rglob(f"{folder}/*")}
    names = ("postprocessing.pkl", "postprocessing.json") if there else ()
    assert found == {name: name for name in names}


def with_stock_network(model: Path, trainer: type[nnUNetTrainer], configuration: str) -> dict[str, torch.Tensor]:
    """Put the weights of a network that nnU-Net builds into fold 0 of a model; returns them."""
    manager = PlansManager(json.loads((model / "plans.json").read_text()))
    dataset_json = json.loads((model / "dataset.json").read_text())
    tiny = manager.get_configuration(configuration)
    channels = determine_num_input_channels(manager, tiny, dataset_json)
    heads = manager.get_label_manager(dataset_json).num_segmentation_heads
    weights = trainer.build_network_architecture(manager, tiny, channels, heads, True).state_dict()
    file = model / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(file, weights_only=True)
    checkpoint["init_args"]["configuration"] = configuration
    torch.save({**checkpoint, "network_weights": weights}, file)
    return weights


def test_a_network_of_another_trainer_of_nnunet(copied, tmp_path, capsys):
    """Batch normalization instead of instance normalization, as nnUNetTrainerBN builds it."""
    model = copied / "CrossMatchTrainer__nnUNetPlans__tiny"
    weights = with_stock_network(model, nnUNetTrainerBN, "tiny")
    model.rename(copied / "BatchNormCrossMatchTrainer__nnUNetPlans__tiny")
    assert export(tmp_path / "out", "-f", "0", trainer="BatchNormCrossMatchTrainer") == 0
    assert "/nnUNetTrainerBN__nnUNetPlans__tiny -i IN" in capsys.readouterr().out
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    model = tmp_path / "out" / DATASET / "nnUNetTrainerBN__nnUNetPlans__tiny"
    predictor.initialize_from_trained_model_folder(str(model), (0,))
    assert_same(predictor.network.state_dict(), weights)


def test_the_second_stage_of_a_cascade_says_that_it_needs_the_first(copied, tmp_path, capsys):
    model = copied / "CrossMatchTrainer__nnUNetPlans__tiny"
    plans = json.loads((model / "plans.json").read_text())
    plans["configurations"]["tiny_cascade"] = {"inherits_from": "tiny", "previous_stage": "tiny_lowres"}
    (model / "plans.json").write_text(json.dumps(plans))
    weights = with_stock_network(model, nnUNetTrainer, "tiny_cascade")
    model.rename(copied / "CrossMatchTrainer__nnUNetPlans__tiny_cascade")
    output = tmp_path / "model.zip"
    assert export(output, "-f", "0", trainer="CrossMatchTrainer", configuration="tiny_cascade") == 0
    printed = capsys.readouterr().out
    assert "tiny_cascade refines what tiny_lowres predicts: export that model as well" in printed
    assert "-prev_stage_predictions" in printed
    with zipfile.ZipFile(output) as archive:
        archive.extractall(tmp_path / "installed")
    (file,) = (tmp_path / "installed").rglob("checkpoint_final.pth")
    assert_same(torch.load(file, weights_only=True)["network_weights"], weights)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["-f", "0", "2"], ["fold_2", "fold_0 (checkpoint_best.pth, checkpoint_final.pth), fold_1"]),
        ([], ["fold_2"]),
        (["-f", "0", "-chk", "checkpoint_latest.pth"], ["checkpoint_latest.pth", "checkpoint_best.pth", "-chk"]),
        (["-f", "0", "-chk", "../checkpoint_final.pth"], ["-chk", "name of a file"]),
        (["-f", "zero"], ["'zero'", "number or 'all'"]),
        (["-f", "0", "-c", "3d_fullres"], ["SimCVDTrainer__nnUNetPlans__3d_fullres", "-c tiny_teacher"]),
        (["-f", "0", "-tr", "CrosMatchTrainer"], ["-tr CrossMatchTrainer -p nnUNetPlans -c tiny", "Correct"]),
        (["-f", "0", "-p", "MyPlans"], ["SimCVDTrainer__MyPlans__tiny", "-p nnUNetPlans"]),
        (["-f", "0", "-d", "Dataset001_Other"], ["Dataset001_Other", f"-d {DATASET}"]),
        (["-f", "0", "-d", "1"], ["Could not find a dataset with the ID 1"]),
        (["-f", "0", "-d", "Phantoms"], ["Phantoms"]),
        (["-f", "0", "-tr", "CrossMatchTrainer", "--weights", "teacher"], ["CrossMatchTrainer has no teacher"]),
    ],
)
def test_mistakes_are_explained(results, tmp_path, capsys, arguments, expected):
    given = ["-d", "998", "-c", "tiny", "-tr", "SimCVDTrainer", "-o", str(tmp_path / "out" / "model.zip"), *arguments]
    assert main(["export", *given]) == 2
    error = capsys.readouterr().err
    assert error.startswith("nnunet-ssl export: error: ")
    for text in expected:
        assert text in error
    assert not list((tmp_path / "out").glob("*"))


def test_a_forgotten_folder_of_trainers_is_told_and_no_other_warning(results, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("nnUNet_extTrainer")
    assert export(tmp_path / "model.zip", "-f", "0") == 2
    error = capsys.readouterr().err
    assert 'export nnUNet_extTrainer="$(nnunet-ssl trainers)"' in error and "SimCVDTrainer, " in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("name", ["model.zip", "model", "folder"])
def test_nothing_is_overwritten(results, tmp_path, capsys, name):
    if name == "folder":
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("precious")
    else:
        (tmp_path / name).write_text("precious")
    assert export(tmp_path / name, "-f", "0") == 2
    assert f"{name} exists already" in capsys.readouterr().err
    assert [path.read_text() for path in (tmp_path / name, tmp_path / name / "thesis.txt") if path.is_file()] == [
        "precious"
    ]


@pytest.mark.parametrize("name", ["model.zip", "model"])
def test_a_place_that_cannot_be_written_is_named(results, tmp_path, capsys, name):
    (tmp_path / "file").touch()
    assert export(tmp_path / "file" / name, "-f", "0") == 2
    error = capsys.readouterr().err
    assert f"{name} cannot be written: " in error and "Choose another place with -o" in error


@pytest.mark.parametrize("value", [None, "no/such/folder"])
def test_needs_nnunet_results(results, monkeypatch, tmp_path, capsys, value):
    if value is None:
        monkeypatch.delenv("nnUNet_results")
    else:
        monkeypatch.setenv("nnUNet_results", value)
    assert export(tmp_path / "model.zip", "-f", "0") == 2
    assert "nnUNet_results is" in capsys.readouterr().err


def test_a_stock_trainer_has_its_own_command(copied, tmp_path, capsys):
    (copied / "CrossMatchTrainer__nnUNetPlans__tiny").rename(copied / "nnUNetTrainer__nnUNetPlans__tiny")
    assert export(tmp_path / "model.zip", "-f", "0", trainer="nnUNetTrainer") == 2
    error = capsys.readouterr().err
    assert "nnUNetv2_export_model_to_zip -d 998 -c tiny -p nnUNetPlans -tr nnUNetTrainer -f 0" in error


def test_a_stock_checkpoint_under_another_name_is_recognized(copied, tmp_path, capsys):
    file = copied / "CrossMatchTrainer__nnUNetPlans__tiny" / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(file, weights_only=True)
    del checkpoint["ssl"]
    torch.save(checkpoint, file)
    assert export(tmp_path / "model.zip", "-f", "0", trainer="CrossMatchTrainer") == 2
    assert "nnUNetv2_export_model_to_zip" in capsys.readouterr().err


def test_a_network_that_nnunet_cannot_build_is_refused(copied, tmp_path, capsys):
    (copied / "CrossMatchTrainer__nnUNetPlans__tiny").rename(copied / "OwnNetworkTrainer__nnUNetPlans__tiny")
    assert export(tmp_path / "model.zip", "-f", "0", trainer="OwnNetworkTrainer") == 2
    assert "OwnNetworkTrainer builds its own network" in capsys.readouterr().err


def change_plans(model: Path, before: str, after: str) -> None:
    text = (model / "plans.json").read_text()
    assert before in text
    (model / "plans.json").write_text(text.replace(before, after))


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda model: (model / "fold_0" / "checkpoint_final.pth").write_bytes(b"PK\x03\x04"), "tensors and plain"),
        (lambda model: (model / "plans.json").unlink(), "plans.json. nnU-Net writes it when a training starts"),
        (lambda model: (model / "dataset.json").write_text("{"), "dataset.json is not valid JSON"),
        (lambda model: change_plans(model, "[4, 6, 8]", "[4, 6, 9]"), "[4, 6, 8] there, [4, 6, 9] here. Restore"),
    ],
    ids=["damaged checkpoint", "no plans", "damaged json", "changed plans"],
)
def test_what_cannot_be_exported_leaves_nothing_behind(copied, tmp_path, capsys, spoil, expected):
    spoil(copied / "SimCVDTrainer__nnUNetPlans__tiny")
    (tmp_path / "out").mkdir()
    assert export(tmp_path / "out" / "model.zip", "-f", "0") == 2
    assert expected in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []
