"""``nnunet-ssl self-train`` as a user calls it."""

from __future__ import annotations

import pytest
from ranked_home import RankedHome

from nnunet_ssl.cli.main import main


@pytest.fixture
def home(tmp_path, monkeypatch) -> RankedHome:
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / "home" / name))
    return RankedHome(tmp_path / "home").fill()


def self_train(home: RankedHome, *arguments: object) -> int:
    return main(["self-train", "-d", "7", "--queue", str(home.queue), "-np", "0", *map(str, arguments)])


def test_what_was_made_is_printed(home, capsys) -> None:
    assert self_train(home, "--as", 951) == 0
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [
        "Labeling 2 case(s) with the consensus of 2 model(s)",
        "Dataset951_Tiny_SelfTrained: made from Dataset007_Tiny",
        "  labeled 4, pseudo-labeled 2, unlabeled 1 case(s)",
        "  ignored because the models disagree: 20.00 % of the pseudo-labeled voxels",
        "",
        "fold  of Dataset007_Tiny  labeled  pseudo-labeled  validation",
        "----  ------------------  -------  --------------  ----------",
        "   0                   0        3               2           1",
        "",
        "Note: fold 1 of Dataset007_Tiny is left out: nnUNetTrainer fold 0 has seen the labels of 1 of its 1 "
        "validation cases (L0).",
        "Next:",
        "  nnUNetv2_preprocess -d 951 -plans_name nnUNetPlans -c 3d_fullres",
        "  nnUNetv2_train 951 3d_fullres 0",
        "  nnUNetv2_predict -d 951 -c 3d_fullres -f 0 -i IMAGES -o PREDICTIONS",
    ]
    before = home.everything()
    assert self_train(home, "--as", 951) == 2
    assert "Dataset951_Tiny_SelfTrained already. Choose another number" in capsys.readouterr().err
    assert home.everything() == before


def test_options(home, capsys) -> None:
    assert self_train(home, "--as", "Dataset951_Mine", "--cases", "U2", "--copy") == 0
    made, _ = home.made("Dataset951_Mine")
    assert sorted(file.name for file in (made / "imagesTr").iterdir() if file.name.startswith("U")) == [
        "U2_0000.nii.gz"
    ]
    assert not (made / "imagesTr" / "U2_0000.nii.gz").is_symlink()
    assert self_train(home, "--as", 952, "--verdicts", "reliable", "look at it") == 0
    assert "pseudo-labeled 3, unlabeled 0" in capsys.readouterr().out
    assert self_train(home, "--as", 953, "--best", "50%") == 0
    assert "pseudo-labeled 2, unlabeled 1" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        self_train(home, "--as", 954, "--best", "2", "--cases", "U2")
    assert "not allowed with argument" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--as", "1951"], "--as is '1951'; give a number from 1 to 999"),
        (["--as", "0"], "numbers of datasets are 1 to 999"),
        (["--as", "Dataset951_../x"], "give a number from 1 to 999, or a name"),
        (["--as", "951", "-np", "-1"], "-np is -1"),
        (["--as", "951", "--verdicts", "good"], "the verdicts are 'label this first', 'look at it', 'reliable'"),
        (["--as", "951", "--best", "0"], "--best is '0'; give a number of cases from 1, or a share such as 50%"),
        (["--as", "951", "--best", "120%"], "--best is '120%'; give"),
        (["--as", "951", "--best", "-1"], "--best is '-1'; give"),
        (["--as", "951", "--best", "half"], "--best is 'half'; give"),
        (["--as", "951", "--best", "4"], "--best asks for 4 cases, and"),
        (["--as", "951", "--queue", "nowhere"], "nowhere is no queue"),
        (["--as", "951", "-d", "8"], "8"),
    ],
)
def test_mistakes_are_explained(home, capsys, arguments, message) -> None:
    before = home.everything()
    assert self_train(home, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("nnunet-ssl self-train: error: ") and message in error
    assert home.everything() == before
