"""The runner of tutorials: what a page's commands print gets into the page, and a stopped run goes on."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest

PROJECT = Path(__file__).resolve().parents[1]
KINDS = ("LABELED", "VALIDATION", "UNLABELED")
TUTORIALS = sorted((PROJECT / "docs" / "tutorials").glob("*.md"))
PAGE = """\
# A page

## First

```bash
export GREETING="hello"
seq 1 9; pwd; echo ran >> count
```

<!-- first 2 and last 1 lines -->

```text
an older output
```

## Second

```bash
echo "$GREETING" > greeting.png
{second}
```

<!-- picture of greeting.png -->

![a greeting](page/greeting.png)

```bash
printf '3%%|#  |\\r4%%|## |\\ndone\\n'
```

```text
```

<!-- times -->
<!-- end of times -->
"""


@pytest.fixture
def tutorial(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("resource", reason="the commands of tutorials are for Bash")
    monkeypatch.syspath_prepend(PROJECT / "website")
    return importlib.import_module("run_tutorial")


@pytest.fixture
def page(tmp_path: Path) -> Path:
    file = tmp_path / "docs" / "page.md"
    file.parent.mkdir()
    file.write_text(PAGE.format(second="true"))
    (tmp_path / "run").mkdir()
    return file


def test_outputs_pictures_and_times_are_written(tutorial: ModuleType, page: Path, tmp_path: Path) -> None:
    tutorial.run(page, tmp_path / "run", [str(tmp_path / "run")])
    text = page.read_text()
    assert "```text\n1\n2\n...\n/data/tutorial\n```" in text and "an older output" not in text
    assert "```text\ndone\n```" in text, "progress bars are left out"
    assert (page.parent / "page" / "greeting.png").read_text() == "hello\n", "variables reach the next block"
    (first, second, all_) = re.findall(r"^\| (First|Second|all) \| [\d.]+ \| [\d.]+ \|$", text, re.MULTILINE)
    assert (first, second, all_) == ("First", "Second", "all")
    tutorial.run(page, tmp_path / "run", [str(tmp_path / "run")])
    assert page.read_text() == text and (tmp_path / "run" / "count").read_text() == "ran\n"


def test_a_run_goes_on_after_the_last_block_that_ended(tutorial: ModuleType, page: Path, tmp_path: Path) -> None:
    page.write_text(PAGE.format(second="echo no memory; exit 3"))
    with pytest.raises(SystemExit, match=r"no memory(.|\n)*The block ended with 3"):
        tutorial.run(page, tmp_path / "run", [])
    assert "...\n/data/tutorial\n" in page.read_text()
    page.write_text(page.read_text().replace("echo no memory; exit 3", "true").replace("# A page", "# Another title"))
    tutorial.run(page, tmp_path / "run", [])
    assert (tmp_path / "run" / "count").read_text() == "ran\n"
    assert "done\n" in page.read_text()


def test_a_block_that_has_run_must_not_be_edited(tutorial: ModuleType, page: Path, tmp_path: Path) -> None:
    tutorial.run(page, tmp_path / "run", [])
    edited = page.read_text().replace("seq 1 9", "seq 1 8")
    page.write_text(edited)
    with pytest.raises(SystemExit, match="Block 0 has changed"):
        tutorial.run(page, tmp_path / "run", [])
    assert page.read_text() == edited


def test_a_path_of_this_machine_is_refused(tutorial: ModuleType, page: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere"
    page.write_text(PAGE.replace("seq 1 9; pwd", f"echo {other}").format(second="true"))
    with pytest.raises(SystemExit, match="names a path of this machine"):
        tutorial.run(page, tmp_path / "run", [str(other)])


def test_two_runs_at_once_are_refused(tutorial: ModuleType, page: Path, tmp_path: Path, monkeypatch) -> None:
    """The page's second block starts a second run in the same folder."""
    folder = tmp_path / "run"
    again = [sys.executable, str(PROJECT / "website" / "run_tutorial.py"), str(page), str(folder)]
    page.write_text(PAGE.format(second=f"! PYTHONPATH={PROJECT} {shlex.join(again)} 2> second"))
    monkeypatch.setattr("sys.argv", ["run_tutorial.py", str(page), str(folder)])
    tutorial.main()
    assert "in use by another run" in (folder / "second").read_text()
    assert (folder / "count").read_text() == "ran\n"


@pytest.fixture
def few_labels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(PROJECT / "benchmarks")
    return importlib.import_module("few_labels")


@pytest.fixture
def decathlon(few_labels: ModuleType, tmp_path: Path) -> Path:
    """Task 4 without content: more cases than are needed, of two channels."""
    source = tmp_path / "Dataset004_Hippocampus"
    for folder in ("imagesTr", "labelsTr"):
        (source / folder).mkdir(parents=True)
    for number in (1, *few_labels.LABELED, *few_labels.VALIDATION, *few_labels.UNLABELED):
        (source / "labelsTr" / f"hippocampus_{number:03d}.nii.gz").write_text(str(number))
        for channel in (0, 1):
            (source / "imagesTr" / f"hippocampus_{number:03d}_{channel:04d}.nii.gz").write_text(f"{number} {channel}")
    (source / "dataset.json").write_text('{"labels": {"background": 0}, "numTraining": 33, "file_ending": ".nii.gz"}')
    return source


def make(few_labels: ModuleType, source: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    person = source.parent / "person"
    arguments = ["few_labels.py", str(source), "--as", "Dataset952_FewLabels", "--person", str(person)]
    monkeypatch.setattr("sys.argv", arguments)
    few_labels.main()
    return source.parent / "Dataset952_FewLabels", person


def test_the_dataset_with_few_labels(few_labels, decathlon, monkeypatch) -> None:
    made, person = make(few_labels, decathlon, monkeypatch)
    names = {kind: {f"hippocampus_{number:03d}" for number in getattr(few_labels, kind)} for kind in KINDS}
    labeled, hidden = names["LABELED"] | names["VALIDATION"], names["UNLABELED"]
    assert [len(cases) for cases in names.values()] == [4, 12, 16] and len(labeled | hidden) == 32
    for folder, cases, channels in (("imagesTr", labeled, 2), ("imagesUn", hidden, 2), ("labelsTr", labeled, 1)):
        files = sorted((made / folder).iterdir())
        assert {file.name[:15] for file in files} == cases and len(files) == channels * len(cases)
        original = decathlon / folder.replace("Un", "Tr")
        assert all(file.read_text() == (original / file.name).read_text() for file in files)
    assert {file.name[:15] for file in person.iterdir()} == hidden, "labels of the pool are with the person alone"
    assert json.loads((made / "dataset.json").read_text())["numTraining"] == 16
    (fold,) = json.loads((made / "splits_final.json").read_text())
    assert {name: set(cases) for name, cases in fold.items()} == {"train": names["LABELED"], "val": names["VALIDATION"]}


def test_a_source_without_a_case_is_refused(few_labels, decathlon, monkeypatch) -> None:
    (decathlon / "labelsTr" / "hippocampus_130.nii.gz").unlink()
    with pytest.raises(SystemExit, match=r"hippocampus_130\.nii\.gz does not exist"):
        make(few_labels, decathlon, monkeypatch)


def test_the_blocks_of_the_pages_have_been_run(tutorial: ModuleType) -> None:
    blocks = [block for page in TUTORIALS for block in tutorial.BLOCK.finditer(page.read_text(encoding="utf-8"))]
    assert len(blocks) > 5
    assert [block["command"] for block in blocks if block["output"] and not block["text"]] == []
