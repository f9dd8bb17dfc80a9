from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from method_steps import make_trainer

from nnunet_ssl.cli.main import main
from nnunet_ssl.methods.crossmatch import CrossMatchTrainer
from nnunet_ssl.trainer.variants import training_length_variants

TRAINERS = training_length_variants(CrossMatchTrainer)


@pytest.fixture
def finish(planned_2d, monkeypatch, tmp_path):
    """Leave what a training leaves; ``stopped`` before its end it has no final checkpoint."""
    for name, value in planned_2d.environment.items():
        if name.startswith("nnUNet"):
            monkeypatch.setenv(name, value)

    def factory(name: str, *, stopped: bool = False, **options: bool) -> Path:
        trainer = make_trainer(TRAINERS[name], planned_2d, monkeypatch, tmp_path, **options)
        trainer.current_epoch = trainer.num_epochs - 1
        folder = Path(trainer.output_folder)
        for file in ("checkpoint_latest.pth" if stopped else "checkpoint_final.pth", "checkpoint_best.pth"):
            trainer.save_checkpoint(str(folder / file))
        return folder

    return factory


def extend(trainer: str, *options: str) -> int:
    given = ["-d", "997", "-c", "tiny", "-f", "0", "-tr", trainer, "-device", "cpu", "--only-prepare", *options]
    return main(["extend", *given])


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_it_goes_on_from_the_longest_finished_one(finish, planned_2d, monkeypatch, tmp_path, capsys):
    folders = {name: finish(f"CrossMatchTrainer_{name}") for name in ("1epoch", "5epochs", "50epochs")}
    unfinished = finish("CrossMatchTrainer_10epochs", stopped=True)
    before = {folder: contents(folder) for folder in (*folders.values(), unfinished)}
    assert extend("CrossMatchTrainer_20epochs") == 0
    printed = capsys.readouterr().out.splitlines()
    finished = folders["5epochs"] / "checkpoint_final.pth"
    assert printed[-2:] == [
        f"CrossMatchTrainer_20epochs continues from {finished}, after 5 of 20 epochs",
        "nnUNetv2_train Dataset997_Phantoms tiny 0 -tr CrossMatchTrainer_20epochs -p nnUNetPlans --c -device cpu "
        "-num_gpus 1",
    ]
    assert {folder: contents(folder) for folder in before} == before
    trainer = make_trainer(TRAINERS["CrossMatchTrainer_20epochs"], planned_2d, monkeypatch, tmp_path)
    folder = Path(trainer.output_folder)
    copied = {name: file for name, file in contents(folder).items() if name.endswith(".pth")}
    assert copied == {
        "checkpoint_latest.pth": finished.read_bytes(),
        "checkpoint_best.pth": (folders["5epochs"] / "checkpoint_best.pth").read_bytes(),
    }
    trainer.load_checkpoint(str(folder / "checkpoint_latest.pth"))
    assert trainer.current_epoch == 5 and trainer.progress == 0.25
    trainer.on_train_epoch_start()
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * (1 - 5 / 20) ** 0.9)
    log = Path(trainer.log_file).read_text()
    assert "is from CrossMatchTrainer_5epochs, after 5 epochs; CrossMatchTrainer_20epochs has 20" in log


@pytest.mark.parametrize("stopped", [True, False])
def test_what_has_begun_goes_on_from_its_own_checkpoint(finish, capsys, stopped):
    finish("CrossMatchTrainer_1epoch")
    own = finish("CrossMatchTrainer_5epochs", stopped=stopped)
    before = contents(own)
    assert extend("CrossMatchTrainer_5epochs") == 0
    assert contents(own) == before
    file = own / f"checkpoint_{'latest' if stopped else 'final'}.pth"
    said = f"has begun: continuing from {file}" if stopped else f"has finished: validating {file}"
    assert f"CrossMatchTrainer_5epochs {said}\n" in capsys.readouterr().out


@pytest.mark.parametrize("copies", [0, 1])
def test_killed_between_its_copies_it_goes_on_with_both(finish, copies, tmp_path):
    finished = finish("CrossMatchTrainer_1epoch")
    copy, done = shutil.copyfile, []

    def copy_or_die(source, target):
        if len(done) == copies:
            raise KeyboardInterrupt
        done.append(copy(source, target))

    with pytest.MonkeyPatch.context() as killed:
        killed.setattr(shutil, "copyfile", copy_or_die)
        assert extend("CrossMatchTrainer_5epochs") != 0
    assert extend("CrossMatchTrainer_5epochs") == 0
    (folder,) = tmp_path.glob("*/CrossMatchTrainer_5epochs*/fold_0")
    copied = {name: content for name, content in contents(folder).items() if "checkpoint" in name}
    assert copied == {
        "checkpoint_latest.pth": (finished / "checkpoint_final.pth").read_bytes(),
        "checkpoint_best.pth": (finished / "checkpoint_best.pth").read_bytes(),
    }


def test_nothing_is_copied_that_cannot_go_on(finish, capsys, tmp_path):
    finish("CrossMatchTrainer_1epoch", regions=True)
    assert extend("CrossMatchTrainer_5epochs") == 2
    assert "outputs (background and classes, or regions) 2 there, 3 here" in capsys.readouterr().err
    assert not list(tmp_path.glob("*/CrossMatchTrainer_5epochs*"))


@pytest.mark.parametrize(
    ("trainer", "options", "expected"),
    [
        ("CrossMatchTrainer_1epoch", [], ["has 1 epochs", "Finished trainings: CrossMatchTrainer_5epochs (5 epochs)"]),
        ("CrossMatchTrainer", ["-f", "1"], ["has 1000 epochs", "and fold 1. Finished trainings: none. Correct -tr"]),
        ("SimCVDTrainer_10epochs", [], ["no finished training of SimCVDTrainer"]),
        ("CrossMatchTrainer_7epochs", [], ["CrossMatchTrainer_7epochs", "such as _250epochs"]),
        ("CrosMatchTrainer_10epochs", [], ["Did you mean CrossMatchTrainer?", "SimCVDTrainer, "]),
        ("nnUNetTrainer_250epochs", [], ["nnUNetTrainer_250epochs is not a semi-supervised trainer"]),
        ("CrossMatchTrainer_10epochs", ["-c", "3d"], ["has no configuration 3d; it has 2d, tiny"]),
        ("CrossMatchTrainer_10epochs", ["-p", "others"], ["plans there: nnUNetPlans"]),
        ("CrossMatchTrainer_10epochs", ["-f", "first"], ["-f is 'first'"]),
    ],
)
def test_mistakes_are_explained(finish, capsys, trainer, options, expected):
    finish("CrossMatchTrainer_5epochs")
    assert extend(trainer, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("nnunet-ssl extend: error: ")
    for text in expected:
        assert text in error
