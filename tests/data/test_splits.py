from __future__ import annotations

import codecs
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnunet_ssl.data.few_labels import label_few, parse_count, split_dataset
from nnunet_ssl.data.fold_check import check_fold
from nnunet_ssl.data.splits import read_splits, unlabeled_list
from nnunet_ssl.errors import UserError

CASES = [f"case_{number:02d}" for number in range(12)]


@pytest.fixture
def folders(tmp_path):
    """A preprocessed dataset of 12 labeled cases, its raw folder and a split file with two folds."""
    preprocessed, raw = tmp_path / "preprocessed" / "Dataset001_X", tmp_path / "raw" / "Dataset001_X"
    (preprocessed / "gt_segmentations").mkdir(parents=True)
    (preprocessed / "dataset.json").write_text(json.dumps({"file_ending": ".nii.gz"}))
    for case in CASES:
        (preprocessed / "gt_segmentations" / f"{case}.nii.gz").touch()
    splits = [{"train": CASES[:8], "val": CASES[8:]}, {"train": CASES[4:], "val": CASES[:4]}]
    (preprocessed / "splits_final.json").write_text(json.dumps(splits))
    return preprocessed, raw


def test_replaces_all_folds_and_keeps_a_backup(folders):
    preprocessed, raw = folders
    file = preprocessed / "splits_final.json"
    before = json.loads(file.read_text())
    report = split_dataset(preprocessed, raw, labeled="3")
    after = json.loads(file.read_text())
    assert report.folds == dict(enumerate(after))
    for old, new in zip(before, after, strict=True):
        assert len(new["train"]) == 3 and len(new["unlabeled"]) == 5
        assert sorted(new["train"] + new["unlabeled"]) == old["train"]
        assert new["val"] == old["val"]
    assert json.loads(report.backup.read_text()) == before
    assert not report.backup.name.endswith(".json")
    assert sorted(entry.name for entry in preprocessed.iterdir() if entry.name.startswith(("splits", "."))) == [
        "splits_final.json",
        report.backup.name,
    ]


def test_same_seed_changes_nothing(folders):
    preprocessed, raw = folders
    split_dataset(preprocessed, raw, labeled="3", seed=4)
    content = (preprocessed / "splits_final.json").read_bytes()
    report = split_dataset(preprocessed, raw, labeled="3", seed=4)
    assert report.backup is None
    assert (preprocessed / "splits_final.json").read_bytes() == content
    again = split_dataset(preprocessed, raw, labeled="3", seed=5)
    assert again.backup is not None and again.folds != report.folds


def test_splitting_again_loses_nothing(folders):
    preprocessed, raw = folders
    before = read_splits(preprocessed / "splits_final.json")
    for labeled in ("2", "5", "1", "100%"):
        report = split_dataset(preprocessed, raw, labeled=labeled)
    assert [{"train": fold["train"], "val": fold["val"]} for fold in report.folds.values()] == before
    assert all(fold["unlabeled"] == [] for fold in report.folds.values())
    backups = sorted(entry.name for entry in preprocessed.glob("splits_final.json.*"))
    assert backups == [f"splits_final.json.bak{suffix}" for suffix in ("", "2", "3", "4")]


def test_one_fold(folders):
    preprocessed, raw = folders
    before = read_splits(preprocessed / "splits_final.json")
    report = split_dataset(preprocessed, raw, labeled="25%", fold=1)
    after = read_splits(preprocessed / "splits_final.json")
    assert after[0] == before[0]
    assert len(after[1]["train"]) == 2 and list(report.folds) == [1]
    with pytest.raises(UserError, match="no fold 2"):
        split_dataset(preprocessed, raw, labeled="2", fold=2)


def test_append_lets_counts_coexist(folders):
    preprocessed, raw = folders
    before = read_splits(preprocessed / "splits_final.json")
    assert list(split_dataset(preprocessed, raw, labeled="2", fold=0, append=True).folds) == [2]
    assert list(split_dataset(preprocessed, raw, labeled="4", fold=0, append=True).folds) == [3]
    repeated = split_dataset(preprocessed, raw, labeled="2", fold=0, append=True)
    assert list(repeated.folds) == [2] and repeated.backup is None
    after = read_splits(preprocessed / "splits_final.json")
    assert after[:2] == before
    assert set(after[2]["train"]) < set(after[3]["train"]), "with one seed, fewer labels are a part of more"


def test_without_a_file_the_folds_are_nnunets_own(folders):
    preprocessed, raw = folders
    (preprocessed / "splits_final.json").unlink()
    report = split_dataset(preprocessed, raw, labeled="100%")
    expected = generate_crossval_split(CASES, seed=12345, n_splits=5)
    assert [(set(fold["train"]), fold["val"]) for fold in report.folds.values()] == [
        (set(fold["train"]), fold["val"]) for fold in expected
    ]
    assert report.backup is None


@pytest.mark.parametrize("count", [2, 3, 4])
def test_of_fewer_than_five_cases_each_is_validated_once(folders, count):
    preprocessed, raw = folders
    (preprocessed / "splits_final.json").unlink()
    for case in CASES[count:]:
        (preprocessed / "gt_segmentations" / f"{case}.nii.gz").unlink()
    folds = split_dataset(preprocessed, raw, labeled="100%").folds
    assert sorted(fold["val"] for fold in folds.values()) == [[case] for case in CASES[:count]]
    assert all(sorted(fold["train"] + fold["val"]) == CASES[:count] for fold in folds.values())
    assert all(fold["unlabeled"] == [] for fold in folds.values())


def test_a_single_case_is_trained_on(folders):
    preprocessed, raw = folders
    (preprocessed / "splits_final.json").unlink()
    for case in CASES[1:]:
        (preprocessed / "gt_segmentations" / f"{case}.nii.gz").unlink()
    assert split_dataset(preprocessed, raw, labeled="100%").folds == {
        0: {"train": CASES[:1], "val": [], "unlabeled": []}
    }


def test_raw_split_file_is_the_start_and_a_conflict_is_reported(folders):
    preprocessed, raw = folders
    raw.mkdir(parents=True)
    (preprocessed / "splits_final.json").rename(raw / "splits_final.json")
    before = read_splits(raw / "splits_final.json")
    appended = split_dataset(preprocessed, raw, labeled="2", append=True)
    assert appended.conflicts_with_raw is None
    assert read_splits(preprocessed / "splits_final.json")[:2] == before
    replaced = split_dataset(preprocessed, raw, labeled="2", fold=0)
    assert replaced.conflicts_with_raw == raw / "splits_final.json"


def test_cases_without_labels_are_never_drawn():
    fold = {"train": ["a"], "val": ["z"], "unlabeled": ["b", "only_image"]}
    for seed in range(8):
        made = label_few(fold, "2", seed=seed, with_labels=["a", "b", "z"])
        assert made == {"train": ["a", "b"], "val": ["z"], "unlabeled": ["only_image"]}
    with pytest.raises(UserError, match="has 2 training cases with labels"):
        label_few(fold, "3", seed=0, with_labels=["a", "b", "z"])


def test_the_draw_depends_on_seed_and_names_only():
    fold = {"train": CASES[:6], "val": CASES[8:], "unlabeled": CASES[6:8]}
    shuffled = {"train": CASES[7:3:-1], "val": CASES[8:], "unlabeled": CASES[:4]}
    one, other = (label_few(entry, "3", seed=2, with_labels=CASES) for entry in (fold, shuffled))
    assert one == other
    assert len({tuple(label_few(fold, "3", seed=seed, with_labels=CASES)["train"]) for seed in range(10)}) > 5


def test_counts():
    assert parse_count("8", 80) == 8
    assert parse_count("10%", 80) == 8
    assert parse_count("10%", 81) == 9, "rounded up"
    assert parse_count("0.1%", 5) == 1
    assert parse_count("12.5 %".replace(" ", ""), 16) == 2
    assert parse_count("100%", 3) == 3
    for wrong in ("0", "-1", "0%", "2.5", "ten", "", "%", "nan", "inf%", "101%", "4"):
        with pytest.raises(UserError, match="labeled cases"):
            parse_count(wrong, 3)


@given(st.integers(1, 1000), st.integers(1, 100))
def test_percentages_round_up(available, percent):
    count = parse_count(f"{percent}%", available)
    assert (count - 1) * 100 < percent * available <= count * 100


def test_unusable_files_are_named(folders, tmp_path):
    preprocessed, raw = folders
    for content in ("{", '{"train": []}', '[{"train": []}]', '[{"train": [1], "val": []}]'):
        (preprocessed / "splits_final.json").write_text(content)
        with pytest.raises(UserError, match=r"splits_final\.json"):
            split_dataset(preprocessed, raw, labeled="1")
        assert (preprocessed / "splits_final.json").read_text() == content
    with pytest.raises(UserError, match="No labeled case"):
        split_dataset(tmp_path / "Dataset009_None", None, labeled="1")


def write(folder, splits):
    file = folder / "splits_final.json"
    file.write_text(splits if isinstance(splits, str) else json.dumps(splits))
    return file


@pytest.mark.parametrize(
    ("fold", "expected"), [(0, []), (1, ["b", "a"]), ("1", ["b", "a"]), (2, []), ("all", []), (-1, [])]
)
def test_unlabeled_list(tmp_path, fold, expected):
    file = write(tmp_path, [{"train": ["a"], "val": []}, {"train": [], "val": [], "unlabeled": ["b", "a"]}])
    assert unlabeled_list(file, fold) == expected


def test_unlabeled_list_without_splits(tmp_path):
    assert unlabeled_list(tmp_path / "splits_final.json", 0) == []


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        ([{"train": [], "val": [], "unlabeled": "LA_001"}], "must be a list of case names, found 'LA_001'"),
        ([{"train": [], "val": [], "unlabeled": ["a", 3]}], "must be a list of case names"),
        ([{"train": [], "val": [], "unlabeled": None}], "must be a list of case names, found None"),
        ([{"train": [], "val": [], "unlabeled": ["a", "b", "a"]}], "names a more than once"),
        ([{"train": ["a", "b", "a"], "val": []}], "The 'train' list of fold 0 .* names a more than once"),
        ([{"train": [], "val": "LA_001"}], "The 'val' list of fold 0 .* must be a list of case names, found 'LA_001'"),
        ([{"train": [], "val": []}, {"val": []}], "There is no list 'train' in fold 1"),
        (
            [{"train": [], "val": [], "unlabelled": ["a"]}],
            "the list 'unlabelled', which nothing reads. Did you mean 'unl",
        ),
        ({"0": {}}, "must hold a list of folds"),
        ([["a"]], "must be a table"),
        ("[{", "not valid JSON"),
    ],
)
def test_malformed_splits(tmp_path, splits, expected):
    file = write(tmp_path, splits)
    with pytest.raises(UserError, match=expected) as error:
        unlabeled_list(file, 0)
    assert str(file) in str(error.value)


@pytest.mark.parametrize(
    ("mark", "encoding"),
    [(codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF32_LE, "utf-32-le")],
)
def test_a_byte_order_mark_is_named(tmp_path, mark, encoding):
    """Python reads such bytes, nnU-Net does not."""
    file = tmp_path / "splits_final.json"
    file.write_bytes(mark + json.dumps([{"train": ["a"], "val": []}]).encode(encoding))
    name = encoding.removesuffix("-le").upper()
    with pytest.raises(UserError, match=rf"splits_final.json begins with a byte-order mark \({name}\).* as UTF-8"):
        read_splits(file)


def check(folder, splits, fold, cases):
    file = folder / "splits_final.json" if splits is None else write(folder, splits)
    return check_fold(file, fold, folder / "plans_2d", cases, train_all="THE COMMAND")


HIDING = [{"train": CASES[:2], "val": CASES[2:3], "unlabeled": CASES[3:]}, {"train": CASES[:11], "val": CASES[11:]}]
OPEN = [{"train": CASES[:11], "val": CASES[11:], "unlabeled": []}]


@pytest.mark.parametrize(
    ("splits", "fold", "cases", "expected"),
    [
        (None, 0, [], "plans_2d contains no preprocessed labeled case"),
        (None, 0, CASES[:4], r"4 labeled case.*\(nnunet-ssl split -d \S+ --labeled 100%\).*\(THE COMMAND\)"),
        (HIDING, 2, CASES, r"no fold 2: .* has folds 0 to 1\..*80 %.* labels that fold\(s\) 0 hide"),
        (HIDING, -1, CASES, "no fold -1"),
        (OPEN, -1, CASES, "no fold -1: .* has fold 0 only"),
        (OPEN, 1, CASES[:1], "no fold 1"),
        ([{"train": [], "val": CASES}], 0, CASES, "no case in the 'train' list of fold 0"),
        (
            [{"train": CASES[:2], "val": [], "unlabeled": CASES[1:3]}],
            0,
            CASES,
            "^Fold 0 in .* lists case_01 as 'train",
        ),
        (
            [{"train": CASES[:2], "val": [], "unlabeled": ["x"]}],
            0,
            CASES,
            "'unlabeled' list of fold 0 in .* names x",
        ),
        ([{"train": ["x"], "val": ["y"]}], 0, CASES, "of fold 0 in .* name x, y, but .*plans_2d contains no such case"),
    ],
)
def test_folds_that_cannot_be_trained(tmp_path, splits, fold, cases, expected):
    with pytest.raises(UserError, match=expected) as error:
        check(tmp_path, splits, fold, cases)
    assert (str(tmp_path / "splits_final.json") in str(error.value)) == bool(cases)


@pytest.mark.parametrize(
    ("splits", "fold", "cases", "expected"),
    [
        (None, 4, CASES, []),
        (None, "all", CASES[:1], []),
        (OPEN, "all", CASES, []),
        (OPEN, 0, CASES, []),
        (HIDING, 0, CASES, []),
        (None, 5, CASES, ["has folds 0 to 4. nnU-Net draws a random 80 %"]),
        (OPEN, 1, CASES, ["has fold 0 only. nnU-Net draws a random 80 %"]),
        ([], 0, CASES, ["has no folds. nnU-Net draws a random 80 %"]),
        (HIDING, "all", CASES, ["labels, also with those that fold(s) 0 of"]),
        ([{"train": CASES, "val": []}], 0, CASES, ["no case in the 'val' list of fold 0"]),
        ([{"train": CASES, "val": CASES[:1]}], 0, CASES, ["both name case_00."]),
        ([{"train": CASES[:8], "val": CASES[8:9]}], 0, CASES, ["3 labeled case(s) are in no list of fold 0"]),
    ],
)
def test_what_a_user_should_know_of_a_fold(tmp_path, splits, fold, cases, expected):
    notes = check(tmp_path, splits, fold, cases)
    assert len(notes) == len(expected)
    assert all(text in note for text, note in zip(expected, notes, strict=True)), notes
