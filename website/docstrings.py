"""Docstrings as Markdown, for mkdocstrings: examples become code blocks, roles become code.

The package's docstrings are written to be read in the source, and doctest runs their examples. Markdown would take the
``>>>`` of an example for a quotation, and the asterisk of ``(B, C, *spatial)`` for emphasis.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^([ ]*)>>> .*(?:\n[ ]*\S.*)*", re.MULTILINE)
ROLE = re.compile(r":\w+:`~?([\w.]+)`")
CODE = re.compile(r"(```.*?```|``.*?``|`.*?`)", re.DOTALL)


def to_markdown(docstring: str) -> str:
    """The same text as Markdown."""
    text = EXAMPLE.sub(lambda example: f"\n{example[1]}```pycon\n{example[0]}\n{example[1]}```\n", docstring)
    text = ROLE.sub(lambda role: f"`{role[1].rsplit('.', 1)[-1]}`", text)
    parts = CODE.split(text)
    # Every other part is code.
    parts[::2] = [
        part.replace("*", r"\*").replace(r"\*\*[choice]\*\*", "**[choice]**").replace("::\n", ":\n")
        for part in parts[::2]
    ]
    return "".join(parts)


class Docstrings(griffe.Extension):
    """Change what is read of every object as it is loaded."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Turn its docstring to Markdown."""
        if obj.docstring:
            obj.docstring.value = to_markdown(obj.docstring.value)

    def on_function(self, *, func: griffe.Function, **kwargs: Any) -> None:
        """Show the default of a setting alone in a signature: ``0.33`` instead of ``setting(0.33, "share of ...")``."""
        for parameter in func.parameters:
            value = parameter.default
            if isinstance(value, griffe.ExprCall) and str(value.function) in ("setting", "ramp_length_setting"):
                parameter.default = value.arguments[0]
