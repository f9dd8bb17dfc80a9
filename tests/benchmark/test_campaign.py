"""Which trainings a campaign has, and what it does to a dataset."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from nnunet_ssl.benchmark.arms import Arm, Stage, parse_arms, plans_of_arm, stages
from nnunet_ssl.benchmark.campaign import (
    Setting,
    configured,
    open_campaign,
    options_of,
    plan_settings,
    plan_trainings,
)
from nnunet_ssl.benchmark.self_training import Home
from nnunet_ssl.cli.lookup import trainers_folder
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import lock
from nnunet_ssl.text import dataset_number


@pytest.fixture
def dataset(planned_2d, tmp_path):
    """The preprocessed dataset, with plans and folds of its own."""
    folder = tmp_path / "preprocessed" / planned_2d.preprocessed.name
    folder.mkdir(parents=True)
    for entry in planned_2d.preprocessed.iterdir():
        if entry.suffix == ".json":
            (folder / entry.name).write_text(entry.read_text())
        elif entry.is_dir():
            (folder / entry.name).symlink_to(entry)
    splits = json.loads((folder / "splits_final.json").read_text())
    (folder / "splits_final.json").write_text(json.dumps(splits[:1]))
    return folder


def begin(dataset, folder, **changed):
    wanted = {"plans": "nnUNetPlans", "configuration": "tiny", "epochs": 2, "validation": None, "configurations": None}
    return open_campaign(folder, preprocessed_folder=dataset, **{**wanted, **changed})


def settings_of(campaign, dataset, **changed):
    wanted = {"raw_folder": None, "labeled": [], "folds": [], "draw_fold": 0}
    return plan_settings(campaign, preprocessed_folder=dataset, **{**wanted, **changed})


def test_trainings_of_whole_seeds_first():
    arms, settings = [Arm("A", "A"), Arm("B", "B")], [Setting("2 labeled", 1, 2), Setting("3 labeled", 0, 3)]
    trainings = plan_trainings(arms, settings, [0, 5])
    assert [one.key for one in trainings[:4]] == [
        *("A; 2 labeled; seed 0", "B; 2 labeled; seed 0", "A; 3 labeled; seed 0", "B; 3 labeled; seed 0"),
    ]
    assert len(trainings) == 8 and trainings[4].key == "A; 2 labeled; seed 5"


def test_arms_with_settings(monkeypatch):
    monkeypatch.setenv("nnUNet_extTrainer", str(trainers_folder()))
    arms = parse_arms(["nnUNetTrainer", "CrossMatchTrainer:ramp_length=0,memory_mode=split"], ["ramp_length=0.5"])
    assert arms[0] == Arm("nnUNetTrainer", "nnUNetTrainer", {}), "nnU-Net's own trainer has no settings"
    assert arms[1].name == 'CrossMatchTrainer:ramp_length=0,memory_mode="split"'
    assert arms[1].settings == {"ramp_length": 0, "memory_mode": "split"}, "its own come before those of all"
    for wrong, message in (
        ("NoTrainer", "does not find the trainer NoTrainer"),
        ("nnUNetTrainer:ramp_length=0", "nnUNetTrainer has no settings"),
        ("CrossMatchTrainer:ramp=0", "does not know"),
        ("CrossMatchTrainer:ramp_length=7", "0 to 1"),
        ("CrossMatchTrainer:ramp_length", "give NAME=VALUE"),
        ("CrossMatchTrainer@warm=1", "such as @warm=0.5"),
        ("CrossMatchTrainer@warm=half", "such as @warm=0.5"),
        ("CrossMatchTrainer@cold=0.5", "such as @warm=0.5"),
        ("nnUNetTrainer@self-train=0", "1 to 9, such as @self-train=1"),
        ("nnUNetTrainer@self-train=one", "such as @self-train=1"),
        ("CrossMatchTrainer:seed=3", "--seeds gives each training its seed"),
        ("CrossMatchTrainer:ramp_length=0,ramp_length=1", "'ramp_length' is given twice"),
    ):
        with pytest.raises(UserError, match=message):
            parse_arms([wrong], [])


def test_settings_of_all_arms_go_to_those_that_have_them(monkeypatch):
    monkeypatch.setenv("nnUNet_extTrainer", str(trainers_folder()))
    plain, cross, bcp = parse_arms(
        ["nnUNetTrainer", "CrossMatchTrainer", "BCPTrainer"], ["ema_decay=0.5", "ramp_length=0"]
    )
    assert plain.settings == {} and cross.settings == {"ramp_length": 0}
    assert bcp.settings == {"ema_decay": 0.5, "ramp_length": 0}
    for arms, setting, message in (
        (["nnUNetTrainer"], "ramp_length=0.5", "no trainer of -tr has the setting 'ramp_length'"),
        (["BCPTrainer"], "ramp_lenght=0.5", "Did you mean ramp_length"),
        (["BCPTrainer"], "seed=5", "--seeds gives each training its seed"),
    ):
        with pytest.raises(UserError, match=message):
            parse_arms(arms, [setting])


def test_a_warm_start_has_two_stages_in_folders_of_their_own(monkeypatch):
    monkeypatch.setenv("nnUNet_extTrainer", str(trainers_folder()))
    warm, plain = parse_arms(["CrossMatchTrainer@warm=0.50:ramp_length=0.2", "CrossMatchTrainer"], [])
    assert warm == Arm("CrossMatchTrainer@warm=0.5:ramp_length=0.2", "CrossMatchTrainer", {"ramp_length": 0.2}, 0.5)
    first, second = stages(warm, 5)
    assert first.arm == Arm("nnUNetTrainer", "nnUNetTrainer") and second.arm == warm
    assert first.epochs + second.epochs == 5 and 2 <= first.epochs <= 3
    assert stages(plain, 5) == [Stage(plain, 5)]
    assert len({one.plans for one in (first, second, *stages(plain, 5))}) == 3
    other, _ = stages(parse_arms(["CrossMatchTrainer@warm=0.5"], [])[0], 5)
    assert other.plans != first.plans, "arms share no start, so that their trainings vary each by itself"
    with pytest.raises(UserError, match="of 1 epochs, 0 would be nnUNetTrainer's and 1 CrossMatchTrainer's"):
        stages(warm, 1)


def test_self_training_has_two_teachers_a_round_and_one_student(monkeypatch):
    monkeypatch.setenv("nnUNet_extTrainer", str(trainers_folder()))
    once, twice = parse_arms(
        ["nnUNetTrainer@self-train=1", "CrossMatchTrainer@self-train=2:ramp_length=0.2"], ["foreground_crops=0"]
    )
    assert once == Arm("nnUNetTrainer@self-train=1", "nnUNetTrainer", {}, 0.0, 1)
    assert twice.name == "CrossMatchTrainer@self-train=2:foreground_crops=0,ramp_length=0.2" and twice.rounds == 2
    student = Arm("nnUNetTrainer", "nnUNetTrainer")
    assert stages(once, 5) == [
        *(Stage(once, 5, "", 0, 0), Stage(once, 5, "", 0, 1), Stage(student, 5, "", 1, 0)),
    ]
    assert [(one.arm, one.round, one.fold) for one in stages(twice, 5)] == [
        *((twice, 0, 0), (twice, 0, 1), (student, 1, 0), (student, 1, 1), (student, 2, 0)),
    ]


def test_datasets_of_rounds_have_numbers_of_their_own(dataset, tmp_path):
    campaign = begin(dataset, tmp_path / "c")
    names = [Home(tmp_path, campaign, "", Arm("A", "A", rounds=3), "cpu").dataset(number) for number in range(4)]
    # The phantoms are number 997.
    assert names == [
        dataset.name,
        "Dataset999_Phantoms_Round1",
        "Dataset998_Phantoms_Round2",
        "Dataset996_Phantoms_Round3",
    ]


def test_settings_are_added_to_those_that_a_configuration_inherits():
    plans = {"configurations": {"a": {"semi_supervised": {"x": 1, "y": 2}}, "b": {"inherits_from": "a"}}}
    changed, name = plans_of_arm(plans, "b", Arm("T:y=3", "T", {"y": 3}))
    assert changed["configurations"][name] == {"inherits_from": "b", "semi_supervised": {"x": 1, "y": 3}}
    assert plans_of_arm(plans, "b", Arm("T", "T")) == (plans, "b")
    assert list(plans["configurations"]) == ["a", "b"]


def test_a_seed_in_the_plans_would_make_all_trainings_the_same(dataset, tmp_path):
    more = tmp_path / "more.json"
    more.write_text(json.dumps({"seeded": {"inherits_from": "tiny", "semi_supervised": {"seed": 3}}}))
    with pytest.raises(UserError, match=r"configuration seeded has the setting 'seed'.* Remove it: --seeds gives"):
        begin(dataset, tmp_path / "c", configuration="seeded", configurations=more)


def test_a_campaign_appends_folds_and_changes_nothing_else(dataset, tmp_path):
    before = {file.name: file.read_bytes() for file in dataset.glob("*.json")}
    campaign = begin(dataset, tmp_path / "c")
    (fold,) = json.loads(before["splits_final.json"])
    drawn, whole = settings_of(campaign, dataset, labeled=["2", "100%"])
    assert (drawn.name, drawn.fold, drawn.labeled) == ("2 labeled", 1, 2)
    assert (whole.name, whole.fold) == (f"{len(fold['train'])} labeled", 0), "all labels: the fold itself"
    splits = json.loads((dataset / "splits_final.json").read_text())
    assert splits[0] == fold and len(splits) == 2
    assert set(splits[1]["train"]) | set(splits[1]["unlabeled"]) == set(fold["train"])
    (taken,) = settings_of(campaign, dataset, folds=[1])
    assert taken.fold == 1
    (elsewhere,) = settings_of(campaign, dataset, labeled=["1"], draw_fold=1)
    assert [options_of(one.name) for one in (drawn, taken, elsewhere)] == [
        *(["--labeled", "2"], ["--folds", "1"], ["--labeled", "1", "--draw-fold", "1"]),
    ]
    assert settings_of(campaign, dataset, labeled=["2"])[0].fold == 1 and len(splits) == 2, "found again"
    for name, content in before.items():
        assert name == "splits_final.json" or (dataset / name).read_bytes() == content

    fewer = begin(dataset, tmp_path / "fewer", validation=1)
    (setting,) = settings_of(fewer, dataset, folds=[0])
    last = json.loads((dataset / "splits_final.json").read_text())[setting.fold]
    assert last["val"] == sorted(fold["val"])[:1] and last["train"] == fold["train"]


def test_a_campaign_stays_what_it_is(dataset, tmp_path):
    campaign = begin(dataset, tmp_path / "c")
    settings_of(campaign, dataset, labeled=["2"])
    assert begin(dataset, tmp_path / "c") == campaign
    with pytest.raises(UserError, match=r"epochs 3 \(there 2\)"):
        begin(dataset, tmp_path / "c", epochs=3)
    # Later changes of the dataset's plans are not the campaign's.
    plans = json.loads((dataset / "nnUNetPlans.json").read_text())
    del plans["configurations"]["tiny"]
    (dataset / "nnUNetPlans.json").write_text(json.dumps(plans))
    assert configured(begin(dataset, tmp_path / "c"), "tiny").batch_size == 2
    splits = json.loads((dataset / "splits_final.json").read_text())
    splits[0]["train"], splits[0]["val"] = splits[0]["train"][:-1], [*splits[0]["val"], splits[0]["train"][-1]]
    (dataset / "splits_final.json").write_text(json.dumps(splits))
    with pytest.raises(UserError, match="2 labeled: the cases are not those"):
        settings_of(campaign, dataset, labeled=["2"])


def test_more_configurations(dataset, tmp_path):
    file = tmp_path / "more.json"
    file.write_text(json.dumps({"tinier": {"inherits_from": "tiny", "batch_size": 3}}))
    campaign = begin(dataset, tmp_path / "c", configuration="tinier", configurations=file)
    assert configured(campaign, "tinier").batch_size == 3
    assert "tinier" not in (dataset / "nnUNetPlans.json").read_text()
    file.write_text(json.dumps({"tiny": {"inherits_from": "2d"}}))
    with pytest.raises(UserError, match="another configuration named 'tiny'"):
        begin(dataset, tmp_path / "d", configurations=file)


def test_what_to_preprocess_is_a_configuration_of_the_plans(dataset, tmp_path):
    file = tmp_path / "more.json"
    file.write_text(json.dumps({"tinier": {"inherits_from": "2d", "batch_size": 3}}))
    plans = json.loads((dataset / "nnUNetPlans.json").read_text())
    plans["configurations"]["2d"]["data_identifier"] = "nowhere"
    (dataset / "nnUNetPlans.json").write_text(json.dumps(plans))
    number = dataset_number(dataset.name)
    with pytest.raises(UserError, match=f"Run nnUNetv2_preprocess -d {number} -plans_name nnUNetPlans -c 2d first"):
        begin(dataset, tmp_path / "c", configuration="tinier", configurations=file)


HOLD = """
import sys
from pathlib import Path
from nnunet_ssl.files import lock
with lock(Path(sys.argv[1])) as held:
    print(held, flush=True)
    sys.stdin.read()
"""


def test_a_lock_is_held_by_one_process_and_dropped_when_it_is_killed(tmp_path):
    file = tmp_path / "folder" / "lock"
    command = [sys.executable, "-c", HOLD, str(file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "True\n"
        with lock(file, wait=False) as held:
            assert not held
        other.kill()
    with lock(file, wait=False) as held:
        assert held
