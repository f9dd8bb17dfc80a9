"""The ``nnunet-ssl`` command: one subcommand per module of this folder.

A subcommand's module bears its name, with ``_`` for ``-``. It has ``HELP``, ``add_arguments(parser)`` and
``run(args) -> int`` and imports nothing heavy before ``run``, so that ``nnunet-ssl --help`` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from nnunet_ssl import __version__
from nnunet_ssl.errors import UserError
from nnunet_ssl.text import did_you_mean, unwrap
from nnunet_ssl.trainer_lookup import RECOMMENDED

COMMANDS = (
    "trainers",
    "methods",
    "preprocess",
    "split",
    "plan-small",
    "convert",
    "doctor",
    "extend",
    "export",
    "adapt",
    "accept",
    "rank",
    "self-train",
    "evaluate",
    "compare",
    "overlay",
    "pilot",
    "benchmark",
    "demo",
)


def module_of(command: str) -> str:
    """The module of a subcommand."""
    return f"nnunet_ssl.cli.{command.replace('-', '_')}"


class Parser(argparse.ArgumentParser):
    """Python's, which before 3.14 does not say what a misspelt command or option may have been meant as."""

    def error(self, message: str) -> NoReturn:
        """End with usage, message and the likely meaning."""
        if wrong := re.search(r"invalid choice: '?([^' ]*)'? \(choose from (.*)\)", message):
            message += did_you_mean([wrong[1]], re.findall(r"[\w-]+", wrong[2]))
        super().error(message)

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """End for arguments that no option takes."""
        options = [option for action in self._actions for option in action.option_strings]
        wrong = [one.partition("=")[0] for one in unknown if one.startswith("-")]
        self.error(f"unrecognized arguments: {' '.join(unknown)}.{did_you_mean(wrong, options)}")


def build_parser() -> Parser:
    """The parser of the whole command. A subcommand that cannot be imported says so, and the others still work."""
    parser = Parser(
        prog="nnunet-ssl",
        description="Semi-supervised training for nnU-Net v2. Training and prediction are nnU-Net's own commands: "
        f"nnUNetv2_train ... -tr {RECOMMENDED}.",
    )
    parser.add_argument("--version", action="version", version=f"nnunet-ssl {__version__}")
    parser.add_argument("--debug", action="store_true", help="show where an unexpected error comes from")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        try:
            module = importlib.import_module(module_of(name))
        except ImportError as error:
            # Without a prefix character its options are taken as they are, so that the reason is what the user sees.
            broken = commands.add_parser(name, help="unavailable", add_help=False, prefix_chars=" ")
            broken.add_argument("ignored", nargs="*")
            broken.set_defaults(run=_unavailable, reason=str(error), parser=parser)
            continue
        command = commands.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(command)
        command.set_defaults(run=module.run, parser=command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code.

    Further codes: 1 for an unexpected error, 2 for a mistake the user can correct, 130 when interrupted, 141 when
    nobody reads the output to its end.
    """
    args, unknown = build_parser().parse_known_args(argv)
    if unknown:
        args.parser.refuse(unknown)
    try:
        with warnings.catch_warnings():
            if not (args.debug or sys.warnoptions):
                # PyTorch's, of what libraries such as timm call when nnU-Net imports them: no user can change that.
                warnings.simplefilter("ignore", FutureWarning)
            code = args.run(args)
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"nnunet-ssl {args.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"nnunet-ssl {args.command}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 141
        if args.debug:
            raise
        what = unwrap(f"{type(error).__name__}: {error}")
        print(f"nnunet-ssl {args.command}: unexpected error: {what}", file=sys.stderr)
        print(f"nnunet-ssl --debug {args.command} ... shows where; please report what it prints.", file=sys.stderr)
        return 1


def _nobody_reads() -> bool:
    """Whether standard output leads to a program that has ended, such as ``head``; then nothing more goes there."""
    try:
        print(flush=True)  # an empty line, since what could not be written is forgotten
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _unavailable(args: argparse.Namespace) -> int:
    raise UserError(f"this command could not be loaded ({args.reason}). Install nnunet-ssl again.")


if __name__ == "__main__":
    sys.exit(main())
