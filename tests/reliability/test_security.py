"""Files from others: checkpoints that hold code, plans that name it, and names that lead out of their folder.

What counts as harm is a file or folder that appears, changes or goes where this package has no business. Wherever the
same file does harm elsewhere, as in PyTorch's default of old or in nnU-Net itself, a test shows that it would.
"""

from __future__ import annotations

import copy
import os
import pickle
import pickletools
import pkgutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from untrusted import ARCHITECTURE, CASES, PLANS, Call, Home, home_of_the_user

import nnunet_ssl
from nnunet_ssl.cli.main import main
from nnunet_ssl.cli.training_checks import check_dataset
from nnunet_ssl.data.previous_stage import PreviousStage
from nnunet_ssl.distributed import Ranks
from nnunet_ssl.errors import UserError
from nnunet_ssl.networks.architectures import check_architecture
from nnunet_ssl.networks.checkpoints import read_checkpoint
from nnunet_ssl.trainer.cascade import segmented_by_previous_stage


@pytest.fixture
def home(tmp_path, monkeypatch) -> Home:
    return home_of_the_user(tmp_path, monkeypatch)


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
    stage = PreviousStage(segmented, trainer.configuration_manager.previous_stage_name)
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
    with pytest.raises(UserError, match="contains a Tensor, not a table"):
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
    with pytest.raises(UserError, match=rf"has {entry} = .* not a network or layer"):
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
