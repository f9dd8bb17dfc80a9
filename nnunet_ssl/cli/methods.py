"""``nnunet-ssl methods``: every trainer of the package, with its idea, its source, its cost and its settings."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

import nnunet_ssl
from nnunet_ssl.cli.lookup import listing, trainer_descriptions, trainers_folder
from nnunet_ssl.errors import UserError
from nnunet_ssl.settings import SemiSupervisedSettings, allowed_values
from nnunet_ssl.text import did_you_mean

HELP = "list the trainers: idea, source, gain, cost of a step, memory, settings"

COSTS = Path(nnunet_ssl.__file__).with_name("costs.json")
GAINS = Path(nnunet_ssl.__file__).with_name("gains.json")
_MODES = ("split", "stacked")
_WIDTH = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``nnunet-ssl methods``."""
    parser.add_argument("trainer", nargs="*", metavar="TRAINER", help="list only these (default: all)")
    parser.add_argument("--markdown", action="store_true", help="print the table of README.md, without settings")


def run(args: argparse.Namespace) -> int:
    """Print the table or the list."""
    methods = every_method()
    unknown = sorted(set(args.trainer) - set(methods))
    if unknown:
        meant = did_you_mean(unknown, methods)
        raise UserError(f"There is no trainer {', '.join(unknown)}.{meant} {listing('There are', [*methods])}")
    chosen = [method for name, method in methods.items() if name in args.trainer or not args.trainer]
    print(markdown_table(chosen) if args.markdown else in_words(chosen))
    return 0


@dataclass(frozen=True)
class Method:
    """What the docstring of a method's module, the measured gains and the measured costs say.

    Attributes:
        trainer: the name for ``-tr``.
        module: of the method.
        name: the method's.
        idea: in one line.
        source: authors, title, where it was published, doi or arXiv.
        gain: of Dice over nnUNetTrainer; empty where not measured.
        step: seconds of a training step by memory mode, over those of nnUNetTrainer's; empty where not measured.
        memory: peak memory of a step, in the same way.
    """

    trainer: str
    module: str
    name: str
    idea: str
    source: str
    gain: Mapping[str, float]
    step: Mapping[str, float]
    memory: Mapping[str, float]

    @property
    def citation(self) -> str:
        """Such as ``Bai et al. 2023``."""
        parts = self.source.partition(";")[0].split(", ")
        authors = list(itertools.takewhile(lambda part: " " not in part, parts))
        who = authors[0] if len(authors) == 1 else f"{authors[0]} et al."
        if len(authors) == 2:
            who = " and ".join(authors)
        return f"{who} {self.year}"

    @property
    def year(self) -> str:
        """Of the publication."""
        without_numbers = re.sub(r"(doi|arXiv) \S+", "", self.source.partition(";")[0])
        found = re.findall(r"\b(?:19|20)\d\d\b", without_numbers)
        return found[-1] if found else ""

    @property
    def link(self) -> str:
        """Where the publication is: by its doi, or on arXiv."""
        places = {"doi": "https://doi.org/", "arXiv": "https://arxiv.org/abs/"}
        for kind, place in places.items():
            found = re.search(rf"\b{kind} ([^\s,;]+[^\s,;.])", self.source.partition(";")[0])
            if found:
                return place + found[1]
        return ""


def every_method() -> dict[str, Method]:
    """The package's methods by trainer, read without importing any of them."""
    gains, costs = measured_gains()["gains"], measured_costs()
    folder, made = trainers_folder(), {}
    for trainer in trainer_descriptions(folder):
        module = _module_of(folder / f"{trainer}.py", trainer)
        file = Path(nnunet_ssl.__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
        name, idea, source = described(ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "")
        step, memory = (costs[kind]["ratios"].get(trainer, {}) for kind in ("step", "memory"))
        made[trainer] = Method(trainer, module, name, idea, source, gains.get(trainer, {}), step, memory)
    return made


def described(docstring: str) -> tuple[str, str, str]:
    """A method's name, its idea and its source, of its module's docstring.

    >>> described("Mean teacher: a student agrees.\\n\\nSource: Tarvainen, Valpola, Mean\\nteachers, 2017.\\n\\nMore.")
    ('Mean teacher', 'a student agrees', 'Tarvainen, Valpola, Mean teachers, 2017')
    """
    first, *paragraphs = docstring.split("\n\n")
    name, _, idea = first.partition(": ")
    sources = [" ".join(one.split()) for one in paragraphs if one.startswith("Source: ")]
    source = sources[0].removeprefix("Source: ") if sources else ""
    return name, idea.removesuffix("."), source.removesuffix(".")


def measured_costs() -> dict[str, Any]:
    """Of steps and memory: ``measured`` says how and when, ``ratios`` has them by trainer and memory mode."""
    return json.loads(COSTS.read_text(encoding="utf-8"))


def measured_gains() -> dict[str, Any]:
    """``measured`` says on what, ``gains`` has by trainer the difference, its 95 % interval and how many trainings."""
    return json.loads(GAINS.read_text(encoding="utf-8"))


def _module_of(file: Path, trainer: str) -> str:
    """The module from which a trainer's file imports it."""
    statements = ast.parse(file.read_text(encoding="utf-8")).body
    (module,) = (
        one.module
        for one in statements
        if isinstance(one, ast.ImportFrom) and one.module and trainer in [alias.name for alias in one.names]
    )
    return module


def markdown_table(methods: Iterable[Method]) -> str:
    """README's table."""
    rows = [
        [
            f"`{one.trainer}`",
            f"[{one.citation}]({one.link})",
            f"{one.name}: {one.idea}",
            f"{one.gain['difference']:+.3f} ({one.gain['trainings']})" if one.gain else "–",
            _ratios(one.step),
            _ratios(one.memory),
        ]
        for one in methods
    ]
    header = ["`-tr`", "source", "idea", "gain (n)", "time per step", "peak memory"]
    lines = [f"| {' | '.join(line)} |" for line in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def _ratios(of_modes: Mapping[str, float]) -> str:
    return " / ".join(f"{of_modes[mode]:.1f}" for mode in _MODES) if of_modes else "–"


def in_words(methods: list[Method]) -> str:
    """Everything, with the settings; imports the methods."""
    text = [_in_words(one) for one in methods]
    common = "\n".join(_setting_lines(dataclasses.fields(SemiSupervisedSettings)))
    measured = {"gain": measured_gains(), **measured_costs()}
    notes = "\n".join(f"{kind}: {measured[kind]['measured']}" for kind in ("gain", "step", "memory"))
    how = f"How gain, step and memory were measured\n{_indented(notes)}"
    return "\n\n".join([*text, f"Settings of every trainer\n{common}", how])


def _in_words(method: Method) -> str:
    trainer = getattr(importlib.import_module(method.module), method.trainer)
    common = {one.name: one for one in dataclasses.fields(SemiSupervisedSettings)}
    own = [one for one in dataclasses.fields(trainer.settings_class) if not _same(one, common.get(one.name))]
    costs = (
        f"a step takes {_cost(method.step)} nnUNetTrainer's time and {_cost(method.memory)} its memory"
        if method.step and method.memory
        else "cost not measured"
    )
    lines = [
        f"{method.trainer}",
        _indented(f"{method.name}: {method.idea}"),
        _indented(f"Source: {method.source}"),
        _indented(_gain(method.gain)),
        _indented(costs),
        *_setting_lines(own),
    ]
    return "\n".join(lines)


def _gain(gain: Mapping[str, float]) -> str:
    if not gain:
        return "gain not measured"
    trainings = f"{gain['trainings']} training{'s' if gain['trainings'] != 1 else ''}"
    return f"gain {gain['difference']:+.3f} Dice, 95 % interval {gain['low']:+.3f} to {gain['high']:+.3f}, {trainings}"


def _cost(of_modes: Mapping[str, float]) -> str:
    return ", ".join(f"{of_modes[mode]:.1f} ({mode})" for mode in _MODES) + " times"


def _same(one: dataclasses.Field[Any], other: dataclasses.Field[Any] | None) -> bool:
    return other is not None and (one.default, one.metadata) == (other.default, other.metadata)


def _setting_lines(options: Iterable[dataclasses.Field[Any]]) -> list[str]:
    lines = []
    for one in options:
        value = f"{one.name} = {json.dumps(one.default)} ({allowed_values(one)})"
        lines.append(_indented(f"{value}: {one.metadata['help']}", hang="    "))
    return lines


def _indented(text: str, hang: str = "") -> str:
    lines = text.splitlines()
    return "\n".join(fill(one, _WIDTH, initial_indent="  ", subsequent_indent=f"  {hang}") for one in lines)
