"""The documentation says what the code does: tables, options, examples and links."""

from __future__ import annotations

import argparse
import functools
import importlib
import inspect
import re
import shlex
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from method_steps import gradients_step, make_batches, make_trainer

from nnunet_ssl.cli.main import COMMANDS, module_of
from nnunet_ssl.trainer.base import SemiSupervisedTrainer
from nnunet_ssl.trainer.variants import TRAINING_LENGTHS
from nnunet_ssl.trainer_lookup import RECOMMENDED

PROJECT = Path(__file__).resolve().parents[1]
DOCS = PROJECT / "docs"
PAGES = [*sorted(PROJECT.glob("*.md")), *sorted(DOCS.rglob("*.md")), PROJECT / "benchmarks" / "README.md"]
RESULTS = sorted((PROJECT / "benchmarks" / "results").glob("*.md"))
METHODS = sorted(path.stem for path in (PROJECT / "nnunet_ssl" / "methods").glob("[!_]*.py"))


def _method(name: str) -> ModuleType:
    return importlib.import_module(f"nnunet_ssl.methods.{name}")


def _trainer(method: str) -> type[SemiSupervisedTrainer]:
    (found,) = (
        value
        for name, value in vars(_method(method)).items()
        if name.endswith("Trainer") and value is not SemiSupervisedTrainer
    )
    return found


def _rows(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("| `")]


def _explanation(method: str) -> str:
    return (DOCS / "explanation" / f"{method}.md").read_text(encoding="utf-8")


@pytest.fixture
def reference_tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(PROJECT / "website")
    return importlib.import_module("reference_tables")


def test_options_and_settings_are_documented(reference_tables: ModuleType) -> None:
    for path, text in reference_tables.pages():
        assert path.read_text(encoding="utf-8") == text, "run python website/reference_tables.py"


def test_rows_of_options(reference_tables: ModuleType) -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("kind", choices=("a", "b"), help="one of two")
    parser.add_argument("folders", nargs="*", metavar="NAME=FOLDER", help="some")
    parser.add_argument("-d", required=True, metavar="DATASET", help="x|y, 10%% of it")
    parser.add_argument("-tr", "--trainer", nargs="+", default="T", metavar="TR", help="default %(default)s")
    parser.add_argument("--table", nargs="?", help="a table")
    parser.add_argument("--seed", type=int, help="a seed")
    parser.add_argument("--append", action="store_true", help="a switch")
    assert reference_tables.option_rows(parser) == [
        "| `{a,b}` | one of two |",
        "| `NAME=FOLDER ...` | some |",
        r"| `-d DATASET` | x\|y, 10% of it; required |",
        "| `-tr TR ...`, `--trainer TR ...` | default T |",
        "| `--table [TABLE]` | a table |",
        "| `--seed SEED` | a seed |",
        "| `--append` | a switch |",
    ]


def test_a_section_without_a_table_is_reported(reference_tables: ModuleType) -> None:
    page = (DOCS / "reference" / "settings.md").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="explanation/urpc"):
        reference_tables.with_setting_tables(page.replace("explanation/urpc.md", "explanation/other.md"))
    before, _ = page.rsplit("| setting |", 1)
    with pytest.raises(ValueError, match="no table"):
        reference_tables.with_setting_tables(before)


@pytest.mark.parametrize("method", [page.stem for page in PAGES if "\n## Settings\n\n–" in page.read_text("utf-8")])
def test_the_explanation_has_the_defaults(reference_tables: ModuleType, method: str) -> None:
    named = [tuple(row.split(" | ")[:2]) for row in _rows(_explanation(method).split("\n## Settings\n")[1])]
    assert named == [tuple(row.split(" | ")[:2]) for row in reference_tables.own_setting_rows(method)]


def test_the_readme_lists_the_lengths_of_training() -> None:
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"^## Trainers\n(.*?)(?=^## )", readme, re.DOTALL | re.MULTILINE)
    assert [int(number) for number in re.findall(r"`_(\d+)epochs?`", section)] == list(TRAINING_LENGTHS)


def test_the_readme_is_short() -> None:
    assert len((PROJECT / "README.md").read_text(encoding="utf-8").splitlines()) < 130


def test_the_readme_recommends_what_commands_do() -> None:
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\*\*try `(\w+)` first\*\*", readme) == [RECOMMENDED]
    examples = set(re.findall(r"-tr (\w+)", readme))
    assert examples == {RECOMMENDED}


def _commands(page: str) -> Iterator[list[str]]:
    """The words of nnU-Net's and this package's commands in blocks of code."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    lines = [*"".join(blocks).replace("\\\n", "").splitlines()]
    lines += re.findall(r"^    +(\S.*)$", page.replace("\\\n", ""), re.MULTILINE)
    for line in lines:
        if "nnunet-ssl" not in line and "nnUNetv2_" not in line:
            continue
        try:
            words = shlex.split(re.sub(r"\$\([^()]*\)", "VALUE", line.removeprefix("$ ")), comments=True)
        except ValueError:  # prose that a command prints
            continue
        ends = [number for number, word in enumerate(words) if re.fullmatch(r"[|;&<>\d]+", word) and not word.isdigit()]
        for start, end in zip([-1, *ends], [*ends, len(words)], strict=True):
            command = words[start + 1 : end]
            if len(command) > 1 and re.fullmatch(r"nnunet-ssl|nnUNetv2_\w+", command[0]):
                yield command


@functools.cache
def _options(program: str, command: str) -> set[str]:
    """The options of one of this package's commands, or of one of nnU-Net's, as its source has them."""
    if program == "nnunet-ssl":
        parser = argparse.ArgumentParser()
        importlib.import_module(module_of(command)).add_arguments(parser)
        return {"--debug", *parser._option_string_actions}
    (script,) = entry_points(group="console_scripts", name=program)
    return {"-h", "--help", *re.findall(r"""["'](--?[a-zA-Z]\w*)["']""", inspect.getsource(script.load()))}


def _name_for_number(words: list[str]) -> bool:
    """Whether a dataset's name follows ``-d`` where nnU-Net only takes its number."""
    takes_number = re.match(r"nnUNetv2_(plan|preprocess|extract)", words[0])
    return bool(takes_number) and "-d" in words and words[words.index("-d") + 1].startswith("Dataset")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(PROJECT).as_posix())
def test_the_commands_of_a_page_have_these_options(page: Path) -> None:
    for words in _commands(page.read_text(encoding="utf-8")):
        program, command = words[0], words[1].strip(",.")
        if program == "nnunet-ssl" and command not in COMMANDS:
            assert command in ("--help", "--version", "--debug", "COMMAND"), " ".join(words)
            continue
        given = {word.split("=")[0] for word in words[1:] if re.match(r"--?[a-zA-Z]", word)}
        assert given <= _options(program, command), " ".join(words)
        assert not _name_for_number(words), " ".join(words)


def test_the_commands_of_a_page_are_found() -> None:
    page = """
```bash
nnUNetv2_train 952 3d_small 0 -tr T > log.txt 2>&1 &
nnunet-ssl rank -d 9 \\
    -c 2d   # a comment
```
text with nnunet-ssl in it

    pip install . && nnunet-ssl demo --all
"""
    assert list(_commands(page)) == [
        ["nnUNetv2_train", "952", "3d_small", "0", "-tr", "T"],
        ["nnunet-ssl", "rank", "-d", "9", "-c", "2d"],
        ["nnunet-ssl", "demo", "--all"],
    ]
    assert "-tr" in _options("nnUNetv2_train", "952") and "--models-of" in _options("nnunet-ssl", "rank")
    assert "-x" not in _options("nnUNetv2_train", "952") | _options("nnunet-ssl", "rank")
    assert _name_for_number(["nnUNetv2_preprocess", "-d", "Dataset901_LeftAtrium"])
    assert not _name_for_number(["nnUNetv2_preprocess", "-d", "901"])
    assert not _name_for_number(["nnUNetv2_predict", "-d", "Dataset901_LeftAtrium"])


def test_messages_name_commands_that_nnunet_takes() -> None:
    """Planning and preprocessing take a dataset's number, and preprocessing the plans after -plans_name."""
    told = []
    for file in [*(PROJECT / "nnunet_ssl").rglob("*.py"), *(PROJECT / "benchmarks").glob("*.py")]:
        # A literal may go on in the next line.
        text = re.sub(r'"\s*\n\s*f?"', "", file.read_text(encoding="utf-8"))
        planning = r"nnUNetv2_plan_and_preprocess -d {dataset_number(\1)}"
        text = re.sub(r"\{planning_command\(([^{}]+)\)\}", planning, text)
        told += [(file.name, one) for one in re.findall(r"nnUNetv2_(?:plan|preprocess|extract)\w* -d .*", text)]
    assert len(told) > 15
    number = r"\{dataset_number\(.+?\)\}|\{number\}|\d+"
    wrong = [one for one in told if not re.match(rf"\w+ -d ({number})", one[1]) or re.search(r" -p \b", one[1])]
    assert not wrong


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", [*PAGES, *RESULTS], ids=lambda page: page.relative_to(PROJECT).as_posix())
def test_code_in_lists_is_code_on_the_site(page: Path) -> None:
    """In an item of a list, lines indented by 8 are code on the site; those indented by 5 to 7 become running text."""
    assert re.findall(r"^\s*\n( {5,7}\S.*)", page.read_text(encoding="utf-8"), re.MULTILINE) == []


@pytest.mark.parametrize("page", [*PAGES, *RESULTS], ids=lambda page: page.relative_to(PROJECT).as_posix())
def test_code_within_a_sentence_is_on_one_line(page: Path) -> None:
    """A command that is copied from the file, and goes on in the next line, would run as its first half."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    paragraphs = [one for one in re.split(r"\n\s*\n", text) if not one.startswith("    ")]
    assert [code for one in paragraphs for code in re.findall(r"`([^`]+)`", one) if "\n" in code] == []


def test_every_result_is_linked() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in [*PAGES, *RESULTS])
    assert [page.name for page in RESULTS if f"{page.name})" not in text and f"{page.name}#" not in text] == []


@pytest.mark.parametrize("page", [*PAGES, *RESULTS], ids=lambda page: page.relative_to(PROJECT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), f"{target} does not exist"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {_anchor(heading) for heading in headings}, f"{target}: no such heading"


def test_every_page_is_linked_from_the_readme() -> None:
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    missing = [path for path in sorted(DOCS.rglob("*.md")) if path.relative_to(PROJECT).as_posix() not in readme]
    assert not missing


@pytest.mark.parametrize("method", METHODS)
def test_functions_that_an_explanation_names_exist(method: str) -> None:
    page = _explanation(method)
    functions = re.findall(r"`((?:data|losses|methods|networks)/\w+)\.py: (\w+)`", page)
    assert functions
    for module, name in functions:
        assert hasattr(importlib.import_module(f"nnunet_ssl.{module.replace('/', '.')}"), name), f"{module}: {name}"
    members = re.findall(r"`([A-Z]\w+)\.(\w+)`", page)
    assert members
    for owner, name in members:
        assert hasattr(getattr(_method(method), owner), name), f"{owner}.{name}"


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_terms_are_documented(method: str) -> None:
    page = (DOCS / "reference" / "log-and-checkpoint.md").read_text(encoding="utf-8")
    trainer = object.__new__(_trainer(method))
    trainer.settings = trainer.settings_class()
    assert {term for term in trainer.loss_weights(0.5) if f"`{term}`" not in page} == set()


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The thin module of the page on writing a method."""
    page = (DOCS / "how-to" / "write-a-method.md").read_text(encoding="utf-8")
    method, module, short = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert set(re.findall(r"^from (nnunet_ssl\S*)", method + module + short, re.MULTILINE)) == {"nnunet_ssl.api"}
    (tmp_path / "somewhere.py").write_text(method, encoding="utf-8")
    (tmp_path / "ConsistencyTrainer.py").write_text(module, encoding="utf-8")
    for name in ("somewhere", "ConsistencyTrainer"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module("ConsistencyTrainer")


@pytest.mark.parametrize("memory_mode", ["split", "stacked"])
def test_the_example_of_a_method_trains(
    example: ModuleType, planned_2d: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory_mode: str
) -> None:
    trainer = make_trainer(
        example.ConsistencyTrainer_5epochs, planned_2d, monkeypatch, tmp_path, memory_mode=memory_mode, weight=2.0
    )
    assert trainer.num_epochs == 5
    labeled, unlabeled, batch = make_batches(trainer)
    logged = trainer.train_step(batch)
    assert logged["loss/total"] == pytest.approx(
        logged["loss/supervised"] + logged["weight/consistency"] * logged["loss/consistency"]
    )
    assert trainer.loss_weights(1.0)["consistency"] == 2.0
    teacher = trainer.training_network.teacher
    assert teacher.updates == 1
    student = trainer.training_network.state_dict()
    for name, tensor in teacher.encoder.state_dict(prefix="encoder.").items():
        assert torch.equal(tensor, student[name]), "the first update copies the student"

    gradients_step(trainer, labeled, unlabeled, {"supervised": 0.0, "consistency": 1.0})
    learned = trainer.training_network.decoder.seg_layers[-1].weight.grad
    assert learned is not None and learned.abs().max() > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())
