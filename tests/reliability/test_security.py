"""Files from others: checkpoints that hold code, plans that name it, and names that lead out of their folder.

What counts as harm is a file or folder that appears, changes or goes where this package has no business. Wherever the
same file does harm elsewhere, as in PyTorch's default of old or in nnU-Net itself, a test shows that it would.
"""

from __future__ import annotations

import ast
import copy
import json
import os
import pickle
import pickletools
import pkgutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from tiny_dataset import unet

import nnunet_ssl
from nnunet_ssl.cli.lookup import trainers_folder
from nnunet_ssl.cli.main import main
from nnunet_ssl.cli.training_checks import check_dataset
from nnunet_ssl.data.conversion import convert_dataset
from nnunet_ssl.data.few_labels import split_dataset
from nnunet_ssl.data.preprocessing import preprocess_unlabeled
from nnunet_ssl.data.previous_stage import PreviousStage
from nnunet_ssl.data.splits import write_splits
from nnunet_ssl.data.unlabeled_cases import collect_unlabeled_cases, ready_cases
from nnunet_ssl.distributed import Ranks
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import write_text
from nnunet_ssl.methods.crossmatch import CrossMatchTrainer
from nnunet_ssl.networks.architectures import check_architecture
from nnunet_ssl.networks.checkpoints import read_checkpoint
from nnunet_ssl.trainer.cascade import segmented_by_previous_stage

PROJECT = Path(__file__).resolve().parents[2]
DATASET = "Dataset007_Tiny"
CASES = [f"case_{number}" for number in range(4)]

_RESAMPLING = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
ARCHITECTURE = unet([4, 6], n_conv_per_stage=[1, 1])
PLANS: dict[str, Any] = {
    "dataset_name": DATASET,
    "plans_name": "nnUNetPlans",
    "image_reader_writer": "SimpleITKIO",
    "transpose_forward": [0, 1, 2],
    "transpose_backward": [0, 1, 2],
    "label_manager": "LabelManager",
    "foreground_intensity_properties_per_channel": {"0": {"mean": 100.0, "std": 20.0}},
    "configurations": {
        "3d": {
            "data_identifier": "nnUNetPlans_3d",
            "preprocessor_name": "DefaultPreprocessor",
            "batch_size": 2,
            "patch_size": [8, 8, 8],
            "batch_dice": False,
            "spacing": [1.0, 1.0, 1.0],
            "normalization_schemes": ["ZScoreNormalization"],
            "use_mask_for_norm": [False],
            "resampling_fn_data": "resample_data_or_seg_to_shape",
            "resampling_fn_data_kwargs": _RESAMPLING,
            "resampling_fn_seg": "resample_data_or_seg_to_shape",
            "resampling_fn_seg_kwargs": {**_RESAMPLING, "is_seg": True, "order": 1},
            "architecture": ARCHITECTURE,
        },
        "3d_cascade": {"inherits_from": "3d", "previous_stage": "3d"},
    },
}
DATASET_JSON: dict[str, Any] = {
    "channel_names": {"0": "MRI"},
    "labels": {"background": 0, "structure": 1},
    "numTraining": 3,
    "file_ending": ".nii.gz",
}


@dataclass
class Home:
    """nnU-Net's folders with a planned dataset, and a folder beside them in which nothing may happen."""

    root: Path

    def __post_init__(self) -> None:
        self.outside = self.root / "outside"
        self.raw = self.root / "raw" / DATASET
        self.preprocessed = self.root / "preprocessed" / DATASET
        self.model = self.root / "results" / DATASET / "CrossMatchTrainer__nnUNetPlans__3d"
        self.labeled = self.preprocessed / "nnUNetPlans_3d"
        self.unlabeled = self.preprocessed / "nnUNetPlans_3d_unlabeled"
        self.records = self.preprocessed / "nnUNetPlans_3d_unlabeled_records"
        for folder in (self.outside, self.raw, self.labeled, self.model / "fold_0"):
            folder.mkdir(parents=True)
        for case in CASES:
            for ending in (".b2nd", "_seg.b2nd", ".pkl"):
                (self.labeled / f"{case}{ending}").touch()
        self.write(self.preprocessed / "splits_final.json", [{"train": CASES[:2], "val": CASES[2:3]}])
        self.write(self.preprocessed / "dataset.json", DATASET_JSON)
        self.write(self.model / "dataset.json", DATASET_JSON)
        self.write_plans(PLANS)
        for name in ("file.txt", "file.json", "file.pkl"):
            (self.outside / name).write_text("untouched")
        self.expect()

    @staticmethod
    def write(file: Path, content: Any) -> None:
        file.write_text(json.dumps(content))

    def write_plans(self, plans: dict[str, Any]) -> None:
        self.write(self.preprocessed / "nnUNetPlans.json", plans)
        self.write(self.model / "plans.json", plans)

    def trainer(self, configuration: str = "3d") -> CrossMatchTrainer:
        plans = {**json.loads((self.preprocessed / "nnUNetPlans.json").read_text()), "continue_training": False}
        return CrossMatchTrainer(plans, configuration, 0, copy.deepcopy(DATASET_JSON), torch.device("cpu"))

    def preprocess(self, plans: dict[str, Any] = PLANS):
        return preprocess_unlabeled(
            raw_dataset_folder=self.raw,
            preprocessed_dataset_folder=self.preprocessed,
            plans_manager=PlansManager(copy.deepcopy(plans)),
            configuration="3d",
            dataset_json=DATASET_JSON,
            num_processes=0,
            log=lambda line: None,
        )

    def expect(self) -> None:
        """What is outside now is to stay as it is."""
        self._before = self._outside()

    def _outside(self) -> dict[str, bytes | None]:
        ours = {self.root / name for name in ("raw", "preprocessed", "results", "given")}
        found = (path for path in self.root.rglob("*") if not ours & {path, *path.parents})
        return {str(path): path.read_bytes() if path.is_file() else None for path in found}

    def assert_nothing_happened_outside(self) -> None:
        assert self._outside() == self._before


@pytest.fixture
def home(tmp_path, monkeypatch) -> Home:
    made = Home(tmp_path / "home")
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(made.root / name))
    monkeypatch.setenv("nnUNet_extTrainer", str(trainers_folder()))
    monkeypatch.setenv("nnUNet_compile", "f")
    # A name without a folder must not do harm where the command is called.
    monkeypatch.chdir(made.outside)
    return made


def link(place: Path, target: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        place.symlink_to(target, target_is_directory=target.is_dir())
    except OSError:
        pytest.skip("links are not allowed here")


# ---- checkpoints ----------------------------------------------------------------------------------------------------


class Call:
    """Unpickled, it calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


PAYLOADS: dict[str, Callable[[Path], Call]] = {
    "os.mkdir": lambda harm: Call(os.mkdir, str(harm)),
    "open": lambda harm: Call(open, str(harm), "w"),
    "exec": lambda harm: Call(exec, f"import os; os.mkdir({str(harm)!r})"),
    "os.system": lambda harm: Call(os.system, f'mkdir "{harm}"'),
    "subprocess": lambda harm: Call(subprocess.call, [sys.executable, "-c", f"import os; os.mkdir({str(harm)!r})"]),
}


def as_zip(file: Path, payload: Any) -> None:
    # All that is asked of a checkpoint before its content is used.
    torch.save({"network_weights": {"encoder": payload}, "ssl": {}, "nnssl_adaptation_plan": {}}, file)


def as_legacy(file: Path, payload: Any) -> None:
    torch.save({"network_weights": {"encoder": payload}}, file, _use_new_zipfile_serialization=False)


def as_pickle(file: Path, payload: Any) -> None:
    file.write_bytes(pickle.dumps(payload))


def as_tar(file: Path, payload: Any) -> None:
    """PyTorch's first format, which before version 2.6 was loaded with weights_only and without caution."""
    with tarfile.open(file, "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            content = pickle.dumps(payload)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, BytesIO(content))


CHECKPOINTS = {f"zip, {name}": (as_zip, payload) for name, payload in PAYLOADS.items()} | {
    "legacy": (as_legacy, PAYLOADS["os.mkdir"]),
    "pickle": (as_pickle, PAYLOADS["os.mkdir"]),
    "tar": (as_tar, PAYLOADS["os.mkdir"]),
}


def make_checkpoint(home: Home, kind: str) -> tuple[Path, Path]:
    """The file, and what appears if its code is run."""
    write, payload = CHECKPOINTS[kind]
    # Where a checkpoint for export and for the next stage would be.
    file, harm = home.model / "fold_0" / "checkpoint_final.pth", home.outside / "harm"
    write(file, payload(harm))
    return file, harm


def resume(home: Home, file: Path) -> None:
    home.trainer().load_checkpoint(str(file))


def use_previous_stage(home: Home, file: Path) -> None:
    segmented = home.model / "predicted_next_stage" / "3d_cascade"
    segmented.mkdir(parents=True)
    for case in CASES[:3]:
        (segmented / f"{case}.b2nd").touch()
    trainer = home.trainer("3d_cascade")
    previous = trainer.configuration_manager.previous_stage_name
    stage = PreviousStage(segmented, previous, "3d_cascade", type(trainer).__name__)
    segmented_by_previous_stage(
        [],
        trainer.unlabeled_source,
        stage,
        labeled_cases=CASES[:3],
        build=type(trainer).build_network_architecture,
        device=torch.device("cpu"),
        ranks=Ranks(),
        log=print,
    )


def command(*arguments: str) -> None:
    if main(list(arguments)) == 2:
        raise UserError("refused")


def adapt(home: Home, file: Path) -> None:
    command("adapt", "-i", str(file), "-d", "7", "-c", "3d", "-o", str(home.root / "given" / "adapted.pth"))


def export(home: Home, file: Path) -> None:
    options = ("-d", "7", "-c", "3d", "-tr", "CrossMatchTrainer", "-f", "0")
    command("export", *options, "-o", str(home.root / "given" / "model.zip"))


READERS: dict[str, Callable[[Home, Path], Any]] = {
    "resume": resume,
    "previous stage": use_previous_stage,
    "adapt": adapt,
    "export": export,
    "read_checkpoint": lambda home, file: read_checkpoint(file),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_these_checkpoints_do_harm_where_they_are_unpickled(kind, home) -> None:
    file, harm = make_checkpoint(home, kind)
    try:
        torch.load(file, weights_only=False)
    except Exception:
        assert harm.exists()  # by then the code was run
    assert harm.exists()


@pytest.mark.parametrize("kind", CHECKPOINTS)
@pytest.mark.parametrize("reader", READERS)
def test_a_checkpoint_with_code_in_it_is_refused_and_the_code_not_run(reader, kind, home, capsys) -> None:
    file, harm = make_checkpoint(home, kind)
    with pytest.raises(UserError) as refused:
        READERS[reader](home, file)
    assert "could not be read as tensors and plain values" in f"{refused.value}{capsys.readouterr().err}"
    assert not harm.exists()
    home.assert_nothing_happened_outside()


def test_formats_of_which_old_versions_run_code_are_not_given_to_pytorch(tmp_path) -> None:
    as_legacy(tmp_path / "old.pth", torch.zeros(1))
    assert "network_weights" in torch.load(tmp_path / "old.pth", weights_only=True)
    with pytest.raises(UserError, match="not in the format that PyTorch writes"):
        read_checkpoint(tmp_path / "old.pth")


def test_a_checkpoint_without_entries_is_refused(tmp_path) -> None:
    torch.save(torch.zeros(1), tmp_path / "tensor.pth")
    with pytest.raises(UserError, match="holds a Tensor and no table"):
        read_checkpoint(tmp_path / "tensor.pth")


def test_our_checkpoints_name_nothing_but_what_tensors_are_made_of(home) -> None:
    trainer = home.trainer()
    trainer.initialize()
    file = home.root / "given.pth"
    trainer.save_checkpoint(str(file))
    assert set(read_checkpoint(file)) >= {"network_weights", "ssl"}
    with zipfile.ZipFile(file) as archive:
        (name,) = (one for one in archive.namelist() if one.endswith("/data.pkl"))
        operations = list(pickletools.genops(archive.read(name)))
    named = {str(argument) for operation, argument, _ in operations if operation.name == "GLOBAL"}
    assert not any(operation.name == "STACK_GLOBAL" for operation, _, _ in operations)
    assert named <= {
        "collections OrderedDict",
        "torch FloatStorage",
        "torch LongStorage",
        "torch._utils _rebuild_tensor_v2",
    }


def test_nothing_is_added_to_what_pytorch_takes_for_safe() -> None:
    """What may be loaded besides is PyTorch's own; this package and nnU-Net add nothing to it."""
    modules = [info.name for info in pkgutil.walk_packages(nnunet_ssl.__path__, "nnunet_ssl.")]
    assert "nnunet_ssl.trainer" in modules
    code = f"""
import torch
listed = torch.serialization.get_safe_globals
alone = listed()
import {", ".join(modules)}
print([one for one in listed() if one not in alone and not str(one.__module__).startswith("torch.")])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"


# ---- plans that name code -------------------------------------------------------------------------------------------

NO_LAYERS = (
    "os.system",
    "subprocess.Popen",
    "builtins.exec",
    "importlib.import_module",
    "nnunetv2.run.run_training.run_training_entry",
    "torch.hub.load",
    "torch.nn.functional.torch.os.system",
    "torch.nn.functional.torch.jit.ScriptModule",
    "torch.nn.modules.container.operator.methodcaller",
    "torch.nn.init.kaiming_normal_",
    ["torch.nn.LeakyReLU"],
)


def architecture(**changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(ARCHITECTURE), "arch_kwargs": {**copy.deepcopy(ARCHITECTURE["arch_kwargs"]), **changes}}


def plans_with(plan: dict[str, Any]) -> dict[str, Any]:
    plans = copy.deepcopy(PLANS)
    plans["configurations"]["3d"]["architecture"] = plan
    return plans


def commanding(harm: Path) -> dict[str, Any]:
    return architecture(nonlin="os.system", nonlin_kwargs={"command": f'mkdir "{harm}"'})


@pytest.mark.parametrize("name", NO_LAYERS, ids=str)
@pytest.mark.parametrize("entry", [*ARCHITECTURE["_kw_requires_import"], "block", "network_class_name"])
def test_plans_may_name_layers_only(entry, name) -> None:
    plan = architecture(**{entry: name} if entry != "network_class_name" else {})
    if entry == "network_class_name":
        plan[entry] = name
    plan["_kw_requires_import"] = [*plan["_kw_requires_import"], "block"]
    with pytest.raises(UserError, match=rf"has {entry} = .* no network or layer"):
        check_architecture(ConfigurationManager({"architecture": plan}))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"nonlin": "torch.nn.modules.activation.GELU"},
        {"norm_op": "torch.nn.BatchNorm3d", "dropout_op": "torch.nn.Dropout3d"},
        {"block": "dynamic_network_architectures.building_blocks.residual.BottleneckD"},
    ],
    ids=str,
)
def test_layers_of_torch_and_of_nnunet_are_allowed(changes) -> None:
    plan = architecture(**changes)
    plan["_kw_requires_import"] = [*plan["_kw_requires_import"], "block"]
    check_architecture(ConfigurationManager({"architecture": plan}))


def test_old_names_of_networks_are_left_to_nnunet() -> None:
    plan = {**architecture(), "network_class_name": "dynamic_network_architectures.architectures.old.PlainConvUNet"}
    check_architecture(ConfigurationManager({"architecture": plan}))


def test_nnunet_itself_calls_what_plans_name(home) -> None:
    harm = home.outside / "harm"
    plan = commanding(harm)
    with pytest.raises(TypeError):
        get_network_from_plans(
            plan["network_class_name"], plan["arch_kwargs"], plan["_kw_requires_import"], 1, 2, deep_supervision=True
        )
    assert harm.exists(), "SECURITY.md says so"


def doctor(home: Home, file: Path) -> None:
    findings = list(check_dataset("7", "3d", "nnUNetPlans", "0", "CrossMatchTrainer"))
    raise UserError("\n".join(finding.text for finding in findings if finding.level == "FAIL"))


def train(home: Home, file: Path) -> None:
    home.trainer().initialize()


@pytest.mark.parametrize("reader", [doctor, adapt, export, train])
def test_plans_that_name_a_command_are_refused_and_it_is_not_run(reader, home, capsys) -> None:
    harm = home.outside / "harm"
    home.write_plans(plans_with(commanding(harm)))
    torch.save({"ssl": {}, "network_weights": {}}, home.model / "fold_0" / "checkpoint_final.pth")
    with pytest.raises(UserError) as refused:
        reader(home, home.model / "fold_0" / "checkpoint_final.pth")
    assert "nonlin = 'os.system'" in f"{refused.value}{capsys.readouterr().err}"
    assert not harm.exists()
    home.assert_nothing_happened_outside()


@pytest.mark.parametrize("key", ["dataset_name", "plans_name"])
def test_a_trainer_of_plans_whose_name_is_a_path_is_refused_before_it_writes(key, home) -> None:
    home.write_plans({**PLANS, key: "../outside"})
    with pytest.raises(UserError, match=f"The plans' {key} is '../outside'"):
        home.trainer()
    home.assert_nothing_happened_outside()


# ---- names that lead elsewhere --------------------------------------------------------------------------------------

ELSEWHERE = (
    "../../../outside/file",
    "../nnUNetPlans_3d/case_3",
    "..\\..\\..\\outside\\file",
    "{outside}/file",
    "C:\\outside\\file",
    "folder/case_3",
    "./case_3",
    "..",
    ".",
    "",
    "case_3\0",
)


@pytest.fixture(params=ELSEWHERE, ids=repr)
def elsewhere(request, home) -> str:
    """A name; what it would find outside is complete, and has code in its properties."""
    for ending in (".b2nd", "_seg.b2nd"):
        (home.outside / f"file{ending}").write_bytes(b"")
    (home.outside / "file.pkl").write_bytes(pickle.dumps(Call(os.mkdir, str(home.outside / "harm"))))
    home.expect()
    return request.param.replace("{outside}", str(home.outside))


def test_an_unlabeled_list_names_cases_of_its_dataset_only(elsewhere, home) -> None:
    splits = [{"train": CASES[:2], "val": CASES[2:3], "unlabeled": [elsewhere]}]
    home.write(home.preprocessed / "splits_final.json", splits)
    with pytest.raises(UserError, match="holds no such case"):
        collect_unlabeled_cases(home.preprocessed, "nnUNetPlans_3d", 0)
    home.assert_nothing_happened_outside()


def test_splitting_takes_names_for_names(elsewhere, home) -> None:
    splits = [{"train": [elsewhere, *CASES[:2]], "val": [elsewhere], "unlabeled": [elsewhere]}]
    home.write(home.preprocessed / "splits_final.json", splits)
    (home.preprocessed / "gt_segmentations").mkdir()
    for case in CASES:
        (home.preprocessed / "gt_segmentations" / f"{case}.nii.gz").touch()
    names = sorted(path.name for path in home.preprocessed.iterdir())
    split_dataset(home.preprocessed, home.raw, labeled="1", seed=1)
    assert sorted(path.name for path in home.preprocessed.iterdir()) == sorted([*names, "splits_final.json.bak"])
    home.assert_nothing_happened_outside()


def test_the_plans_folder_of_images_is_in_the_dataset(elsewhere, home) -> None:
    plans = copy.deepcopy(PLANS)
    plans["configurations"]["3d"]["data_identifier"] = elsewhere
    (home.raw / "imagesUn").mkdir()
    for use in (
        lambda: home.preprocess(plans),
        lambda: ready_cases(home.preprocessed, elsewhere),
        lambda: collect_unlabeled_cases(home.preprocessed, elsewhere, 0),
    ):
        with pytest.raises(UserError, match=r"data_identifier is .*, which is no name of a folder"):
            use()
    home.assert_nothing_happened_outside()


def test_records_of_cases_that_are_gone_take_nothing_else_along(elsewhere, home) -> None:
    record = {
        "status": "ok",
        "identifier": elsewhere,
        "sources": [{"name": elsewhere, "size": 0, "mtime_ns": 0}],
        "warnings": [],
        "signature": {"shape": [1, 1, 1, 1], "values": []},
        "format_version": 1,
        "fingerprint": elsewhere,
    }
    for folder in (home.raw / "imagesUn", home.unlabeled, home.records):
        folder.mkdir()
    flat = elsewhere.translate(dict.fromkeys(map(ord, "/:\0" if os.name != "nt" else '/\\:\0"'), "_"))
    for ending in (".b2nd", "_seg.b2nd"):
        (home.unlabeled / f"{flat}{ending}").touch()
    (home.unlabeled / f"{flat}.pkl").write_bytes(pickle.dumps(Call(os.mkdir, str(home.outside / "harm"))))
    home.write(home.records / f"{flat}.json", record)
    home.preprocess()
    assert ready_cases(home.preprocessed, "nnUNetPlans_3d") == {}
    assert sorted(path.name for path in home.labeled.iterdir()) == sorted(
        f"{case}{ending}" for case in CASES for ending in (".b2nd", "_seg.b2nd", ".pkl")
    )
    home.assert_nothing_happened_outside()


@pytest.mark.parametrize("linked", ["unlabeled", "records"])
def test_nothing_is_removed_through_a_linked_folder(linked, home) -> None:
    (home.raw / "imagesUn").mkdir()
    link(getattr(home, linked), home.outside)
    with pytest.raises(UserError, match="is a link"):
        home.preprocess()
    home.assert_nothing_happened_outside()


def test_a_preprocessed_case_replaces_links_and_not_where_they_lead(home) -> None:
    (home.raw / "imagesUn").mkdir()
    image = sitk.GetImageFromArray(np.random.default_rng(0).uniform(50, 150, (8, 9, 10)).astype(np.float32))
    sitk.WriteImage(image, str(home.raw / "imagesUn" / "new_0000.nii.gz"))
    for folder, ending in ((home.unlabeled, ".pkl"), (home.unlabeled, ".b2nd"), (home.records, ".json")):
        link(folder / f"new{ending}", home.outside / "file.txt")
    assert home.preprocess().done == ["new"]
    assert not any(path.is_symlink() for folder in (home.unlabeled, home.records) for path in folder.iterdir())
    home.assert_nothing_happened_outside()


@pytest.mark.parametrize("target", ["file.txt", "new.txt"])
@pytest.mark.parametrize(
    ("name", "write"),
    [
        (f".evaluation.json.{os.getpid()}", lambda folder: write_text(folder / "evaluation.json", "{}")),
        (f".splits_final.json.{os.getpid()}", lambda folder: write_splits(folder / "splits_final.json", [])),
        ("splits_final.json.bak", lambda folder: split_dataset(folder, None, labeled="1")),
        ("splits_final.json", lambda folder: split_dataset(folder, None, labeled="1")),
        ("evaluation.json", lambda folder: write_text(folder / "evaluation.json", "{}")),
    ],
)
def test_nothing_is_written_through_a_link(name, write, target, home) -> None:
    (home.preprocessed / "gt_segmentations").mkdir()
    for number in range(6):
        (home.preprocessed / "gt_segmentations" / f"case_{number}.nii.gz").touch()
    if name == "splits_final.json":
        (home.preprocessed / name).unlink()
        if target == "file.txt":
            home.write(home.outside / target, [{"train": CASES[:2], "val": CASES[2:]}])
            home.expect()
    link(home.preprocessed / name, home.outside / target)
    write(home.preprocessed)
    home.assert_nothing_happened_outside()


@pytest.mark.parametrize("name", ["..hidden", "-o", "a b", "a\nb", "..\\..\\outside", "$(mkdir harm)", "a;mkdir harm"])
def test_a_download_names_files_of_its_dataset_only(name, home) -> None:
    source = home.root / "given" / "download"
    for case in [*(f"CASE{number}" for number in range(5)), name]:
        try:
            (source / "Training Set" / case).mkdir(parents=True)
        except OSError:
            pytest.skip("no name of a folder here")
        for file, array in (("lgemri.nrrd", np.zeros((4, 4, 4))), ("laendo.nrrd", np.full((4, 4, 4), 255))):
            sitk.WriteImage(sitk.GetImageFromArray(array.astype(np.uint8)), source / "Training Set" / case / file)
    report = convert_dataset("la", source, home.root / "raw" / "Dataset008_LA", labeled="1")
    assert report.train == [f"CASE{number}" for number in range(5)]
    assert [problem.identifier for problem in report.failed] == [name]
    home.assert_nothing_happened_outside()


@pytest.mark.parametrize("line", ["../../outside/file", "/outside/file", "CASE0/../../file", "CASE0\\..\\file"])
def test_a_list_of_test_cases_names_cases_only(line, home) -> None:
    source = home.root / "given" / "download"
    for number in range(5):
        (source / f"CASE{number}").mkdir(parents=True)
        for file in ("lgemri.nrrd", "laendo.nrrd"):
            (source / f"CASE{number}" / file).touch()
    (source / "test.list").write_text(f"{line}\n")
    with pytest.raises(UserError, match="is no case of this dataset"):
        convert_dataset("la", source, home.root / "raw" / "Dataset008_LA", labeled="1")
    home.assert_nothing_happened_outside()


@pytest.mark.parametrize("record", [{"dataset": "la", "source": "../../outside"}, ["../../outside"], "../outside", 1])
def test_a_record_of_a_conversion_is_compared_and_not_followed(record, home) -> None:
    source, dataset = home.root / "given" / "download", home.root / "raw" / "Dataset008_LA"
    for number in range(6):
        (source / f"CASE{number}").mkdir(parents=True)
        for file in ("lgemri.nrrd", "laendo.nrrd"):
            (source / f"CASE{number}" / file).touch()
    dataset.mkdir()
    home.write(dataset / "conversion.json", record)
    with pytest.raises(UserError, match="was converted from something else"):
        convert_dataset("la", source, dataset, labeled="1")
    assert [path.name for path in dataset.iterdir()] == ["conversion.json"]
    home.assert_nothing_happened_outside()


# ---- the source -----------------------------------------------------------------------------------------------------

# Formats that can carry code or names of files, and who may use them nevertheless.
_FORMATS = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml", "tarfile", "zipfile")
_FORMATS_USED = {("nnunet_ssl/cli/export.py", "zipfile")}  # writes one; nothing here reads an archive

# nnU-Net's dataset classes unpickle a preprocessed case's properties, CASE.pkl. These are written by nnU-Net's own
# preprocessing into nnUNet_preprocessed, where nnU-Net unpickles those of the labeled cases in every training.
_CASES_READ = {
    "nnunet_ssl/data/leak_guard.py",
    "nnunet_ssl/data/loader.py",
    "nnunet_ssl/data/previous_stage.py",
}

_FORBIDDEN_CALLS = {
    *("eval", "exec", "compile", "__import__", "system", "popen", "getoutput", "getstatusoutput", "extractall"),
    *("unpack_archive", "add_safe_globals", "safe_globals", "load_pickle", "read_pickle", "unpickle", "mktemp"),
}


def problems_in(source: str, name: str) -> Iterator[str]:
    """What the source does that it must not, line by line."""
    for node in ast.walk(ast.parse(source)):
        imported: list[str] = []
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported = [node.module or "", *(alias.name for alias in node.names)]
        for module in imported:
            if module.split(".")[0] in _FORMATS and (name, module) not in _FORMATS_USED:
                yield f"line {node.lineno}: imports {module}"
            if module in _FORBIDDEN_CALLS:
                yield f"line {node.lineno}: imports {module}"
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        owner = ast.unparse(called.value) if isinstance(called, ast.Attribute) else ""
        function = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
        options = {keyword.arg: keyword.value for keyword in node.keywords}
        # A network's or a regular expression's own method of this name is another one.
        method = function in ("eval", "compile") and owner not in ("", "builtins")
        if function in _FORBIDDEN_CALLS and not method:
            yield f"line {node.lineno}: calls {function}"
        if function == "load" and owner == "torch" and ast.unparse(options.get("weights_only", node)) != "True":
            yield f"line {node.lineno}: torch.load without weights_only=True"
        if function == "load_case" and name not in _CASES_READ:
            yield f"line {node.lineno}: reads a case with nnU-Net's dataset class, which unpickles"
        for option in ("shell", "allow_pickle"):
            if option in options and ast.unparse(options[option]) != "False":
                yield f"line {node.lineno}: {option}={ast.unparse(options[option])}"
        if owner == "subprocess" and node.args and isinstance(node.args[0], (ast.Constant, ast.JoinedStr, ast.BinOp)):
            yield f"line {node.lineno}: a command as text"
        if None in options and (owner in ("torch", "subprocess")):
            yield f"line {node.lineno}: options of {function} that cannot be read here"


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "torch.load(file, weights_only=safe)",
        "torch.load(file, **options)",
        "import pickle",
        "from pickle import loads",
        "import zipfile",
        "from os import system",
        "os.system('ls')",
        "os.popen('ls')",
        "subprocess.run(command, shell=True)",
        "subprocess.run(command, shell=shell)",
        "subprocess.run('ls')",
        "subprocess.run(f'ls {folder}')",
        "subprocess.run('ls ' + folder)",
        "eval(text)",
        "exec(text)",
        "builtins.eval(text)",
        "compile(text, '', 'eval')",
        "__import__(name)",
        "archive.extractall(folder)",
        "shutil.unpack_archive(file)",
        "np.load(file, allow_pickle=True)",
        "load_pickle(file)",
        "torch.serialization.add_safe_globals([A])",
        "dataset.load_case(name)",
    ],
)
def test_the_check_of_the_source_finds(source) -> None:
    assert list(problems_in(source, "nnunet_ssl/some.py"))


def test_the_check_of_the_source_lets_pass() -> None:
    harmless = """
torch.load(file, map_location="cpu", weights_only=True)
network.eval()
re.compile(pattern)
subprocess.run(["ls", folder], check=True)
subprocess.run(command, shell=False)
np.load(file)
"""
    assert not list(problems_in(harmless, "nnunet_ssl/some.py"))


@pytest.mark.parametrize(
    "file",
    sorted(path for folder in ("nnunet_ssl", "trainers", "benchmarks") for path in (PROJECT / folder).rglob("*.py")),
    ids=lambda file: file.relative_to(PROJECT).as_posix(),
)
def test_the_source_unpickles_nothing_and_runs_no_text(file) -> None:
    name = file.relative_to(PROJECT).as_posix()
    assert not list(problems_in(file.read_text(encoding="utf-8"), name))
