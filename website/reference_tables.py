"""Tables of the reference, made from what they describe: options from the parsers, settings from the dataclasses.

``python website/reference_tables.py`` writes them into docs/reference/command-line.md and docs/reference/settings.md.
The text around the tables is written by hand.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

from nnunet_ssl.cli.main import COMMANDS, module_of
from nnunet_ssl.settings import SemiSupervisedSettings, allowed_values
from nnunet_ssl.trainer.base import SemiSupervisedTrainer

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "docs" / "reference"
METHODS = sorted(path.stem for path in (ROOT / "nnunet_ssl" / "methods").glob("[!_]*.py"))
TABLE = re.compile(r"^\|.*\n(?:\|.*\n)*", re.MULTILINE)


def with_option_tables(page: str) -> str:
    """The page on the command line, with the table of each command's section made from its parser."""
    for command in COMMANDS:
        parser = argparse.ArgumentParser(add_help=False)
        importlib.import_module(module_of(command)).add_arguments(parser)
        page = _with_table(page, rf"^## {command}\n", "| option | meaning |", option_rows(parser))
    return page


def with_setting_tables(page: str) -> str:
    """The page on settings: those of every method, then in each method's section those that are its own."""
    columns = "| setting | default | allowed | meaning |"
    page = _with_table(page, r"^## Of every method\n", columns, setting_rows(SemiSupervisedSettings))
    for method in METHODS:
        section = rf"^## .*\n(?:(?!## ).*\n)*?.*\(\.\./explanation/{method}\.md"
        page = _with_table(page, section, columns, own_setting_rows(method))
    return page


def option_rows(parser: argparse.ArgumentParser) -> list[str]:
    """A row for each argument, in the parser's order."""
    rows = []
    for action in parser._actions:
        value = _value(action)
        names = [f"`{option} {value}`" if value else f"`{option}`" for option in action.option_strings]
        help_text = parser._get_formatter()._expand_help(action)
        required = "; required" if action.required and action.option_strings else ""
        rows.append(_row(", ".join(names or [f"`{value}`"]), help_text + required))
    return rows


def setting_rows(settings_class: type[SemiSupervisedSettings]) -> list[str]:
    """A row for each setting, in the dataclass's order."""
    return [
        _row(f"`{option.name}`", f"`{json.dumps(option.default)}`", allowed_values(option), option.metadata["help"])
        for option in dataclasses.fields(settings_class)
    ]


def own_setting_rows(method: str) -> list[str]:
    """Rows of a method's settings that are not those of every method: new ones, and inherited ones it changes."""
    module = importlib.import_module(f"nnunet_ssl.methods.{method}")
    (trainer,) = (
        value for name, value in vars(module).items() if name.endswith("Trainer") and value is not SemiSupervisedTrainer
    )
    common = setting_rows(SemiSupervisedSettings)
    return [row for row in setting_rows(trainer.settings_class) if row not in common]


def _value(action: argparse.Action) -> str:
    """What is written after an option, or in place of a positional argument; empty for a switch."""
    if action.nargs == 0:
        return ""
    name = str(action.metavar or action.dest.upper())
    if action.choices is not None and action.metavar is None:
        name = "{" + ",".join(map(str, action.choices)) + "}"
    return {"+": f"{name} ...", "*": f"{name} ...", "?": f"[{name}]"}.get(str(action.nargs), name)


def _with_table(page: str, section: str, columns: str, rows: list[str]) -> str:
    """The page with another table in a section; the section begins with what the pattern finds.

    Raises:
        ValueError: not exactly one section is found, or the section has no table to replace.
    """
    begins = [found.start() for found in re.finditer(section, page, re.MULTILINE)]
    if len(begins) != 1:
        raise ValueError(f"The page has {len(begins)} sections that begin with {section}; it needs one.")
    end = page.find("\n## ", begins[0]) + 1 or len(page)
    table = "\n".join([columns, re.sub(r"[^|]+", "---", columns), *rows]) + "\n"
    filled, count = TABLE.subn(lambda _: table, page[begins[0] : end], count=1)
    if not count:
        raise ValueError(f"The section that begins with {section} has no table; write its first line, {columns}")
    return page[: begins[0]] + filled + page[end:]


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def pages() -> Iterator[tuple[Path, str]]:
    """Each page's file, and its text with the tables as they should be."""
    for name, complete in (("command-line.md", with_option_tables), ("settings.md", with_setting_tables)):
        path = REFERENCE / name
        yield path, complete(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    for path, text in pages():
        path.write_text(text, encoding="utf-8")
