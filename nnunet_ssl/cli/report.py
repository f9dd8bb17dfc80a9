"""The text of ``nnunet-ssl doctor --report``, to paste into an issue: without names of cases and of other folders."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nnunet_ssl import __version__
from nnunet_ssl.cli.findings import Finding
from nnunet_ssl.cli.lookup import dataset_name, described, model_name
from nnunet_ssl.errors import UserError
from nnunet_ssl.settings import PLANS_KEY
from nnunet_ssl.text import by_axis, unwrap
from nnunet_ssl.trainer_lookup import trainers_folder

_FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
# What else changes a training; their values name nothing.
_VARIABLES = (
    "nnUNet_def_n_proc",
    "nnUNet_n_proc_DA",
    "nnUNet_compile",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "CUDA_VISIBLE_DEVICES",
    "PYTORCH_CUDA_ALLOC_CONF",
)
_LOG_LINES, _WIDTH = 20, 300
_RAW_FOLDERS = ("imagesTr", "labelsTr", "imagesUn", "imagesTs", "labelsTs")
_ENDING = re.compile(r"(\.nii)?\.[A-Za-z]\w{0,4}$")
# Not within a word, a path that is shortened already or an address.
_ABSOLUTE_PATH = re.compile(r"""(?<![\w$~.<>/\\])(?:[A-Za-z]:[\\/]|/(?!/))[^\s:;,'"()]+""")


@dataclass(frozen=True)
class Training:
    """What the user asked about.

    Attributes:
        dataset: full name, such as Dataset901_LeftAtrium.
        configuration: None where the user asked about the dataset alone.
        fold: a number or ``all``.
    """

    dataset: str
    configuration: str | None
    plans: str
    fold: str
    trainer: str

    @property
    def raw(self) -> Path:
        """The dataset's folder in nnUNet_raw."""
        return Path(os.environ["nnUNet_raw"], self.dataset)

    @property
    def preprocessed(self) -> Path:
        """The dataset's folder in nnUNet_preprocessed."""
        return Path(os.environ["nnUNet_preprocessed"], self.dataset)

    @property
    def results(self) -> Path:
        """The folder of the fold, whether there is one or not."""
        model = model_name(self.trainer, self.plans, str(self.configuration))
        return Path(os.environ["nnUNet_results"], self.dataset, model, f"fold_{self.fold}")


def report(args: argparse.Namespace, findings: Iterable[Finding]) -> str:
    """The whole text.

    Args:
        args: of ``nnunet-ssl doctor``.
        findings: the checks, in their order; their first line has the versions.
    """
    training = _training(args)
    sections: dict[str, Iterable[str]] = {"system": _system(), "checks": map(str, findings)}
    if training is not None:
        sections["plans"] = _plans(training)
    if training is not None and training.configuration is not None:
        sections["log"] = _log(training)
    options = {"-d": args.d, "-c": args.c, "-p": args.p, "-f": args.f, "-tr": args.tr}
    call = " ".join(f"{option} {value}" for option, value in options.items() if value is not None)
    lines = [f"nnunet-ssl {__version__}: doctor --report {call}"]
    for title, content in sections.items():
        lines += ["", f"[{title}]", *_as_far_as_it_goes(content)]
    hidden = Hidden.of(training)
    return "\n".join(map(hidden.replaced, lines))


def _as_far_as_it_goes(lines: Iterable[str]) -> Iterator[str]:
    """A section that breaks off says why: a report is for when things are broken."""
    try:
        yield from lines
    except Exception as error:
        yield f"not available: {unwrap(described(error), _WIDTH)}"


def _training(args: argparse.Namespace) -> Training | None:
    """None without a dataset, and where the checks say that it cannot be found."""
    if args.d is None or not all(os.environ.get(name) for name in _FOLDERS):
        return None
    with contextlib.suppress(UserError):
        return Training(dataset_name(args.d), args.c, args.p, args.f, args.tr)
    return None


# Sections


def _system() -> Iterator[str]:
    yield f"{platform.platform()}, {os.cpu_count()} cores"
    values = [f"{name}={os.environ[name]}" for name in _VARIABLES if name in os.environ]
    yield f"environment: {', '.join(values) or 'none of ' + ', '.join(_VARIABLES)}"

    import torch

    yield f"PyTorch's CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"


def _plans(training: Training) -> Iterator[str]:
    """The configuration in short."""
    plans = json.loads((training.preprocessed / f"{training.plans}.json").read_text(encoding="utf-8"))
    yield f"{training.plans} with {', '.join(plans['configurations'])}"
    if training.configuration is None:
        return

    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    configuration = PlansManager(plans).get_configuration(training.configuration).configuration
    yield (
        f"{training.configuration}: patch {by_axis(configuration['patch_size'])}, batch {configuration['batch_size']}, "
        f"spacing {by_axis(configuration['spacing'])}"
    )
    network = configuration["architecture"]
    sizes = {name: network["arch_kwargs"].get(name) for name in ("features_per_stage", "strides")}
    yield f"{network['network_class_name'].rpartition('.')[2]} {json.dumps(sizes)}"
    yield f"{PLANS_KEY}: {json.dumps(configuration.get(PLANS_KEY, {}))}"


def _log(training: Training) -> Iterator[str]:
    """The last lines of the newest log of the training."""
    logs = sorted(training.results.glob("training_log_*.txt"), key=lambda file: file.stat().st_mtime)
    if not logs:
        yield "none: no such training has begun"
        return
    lines = logs[-1].read_text(encoding="utf-8", errors="replace").splitlines()
    yield from (line.rstrip()[:_WIDTH] for line in lines[-_LOG_LINES:] if line.strip())


# What is left out


@dataclass(frozen=True)
class Hidden:
    """What a report does not show.

    Attributes:
        folders: paths with what is written in their place, the longest path first.
        cases: names of cases with what is written in their place, the longest name first.
    """

    folders: dict[str, str]
    cases: dict[str, str]

    @classmethod
    def of(cls, training: Training | None) -> Hidden:
        """The folders of this environment and the cases of a dataset."""
        # The home may have a space in it. What becomes of it is a path still, and shortened like every other.
        home = os.path.expanduser("~")  # noqa: PTH111 - Path raises an error where there is none
        folders = {home: "/home", sys.prefix: "<python>", str(trainers_folder()): "<trainers>"}
        folders |= {value: f"${name}" for name in _FOLDERS if (value := os.environ.get(name, "").rstrip("/\\"))}
        folders |= {str(Path(folder).resolve()): name for folder, name in folders.items()}
        names = sorted(_case_names(training)) if training is not None else []
        cases = {name: f"<case {number}>" for number, name in enumerate(names, start=1)}
        return cls(_longest_first(folders), _longest_first(cases))

    def replaced(self, line: str) -> str:
        """A line without them. Of any other absolute path nothing is left, or a Python file's name."""
        for folder, name in self.folders.items():
            if len(folder) > 1:
                line = re.sub(rf"(?<![\w.-]){re.escape(folder)}(?![\w.-])", name, line)
        line = _ABSOLUTE_PATH.sub(_shortened, line)
        if self.cases:
            names = "|".join(map(re.escape, self.cases))
            line = re.sub(rf"(?<![^\W_])(?:{names})(?![^\W_])", lambda match: self.cases[match[0]], line)
        return line


def _longest_first(replacements: dict[str, str]) -> dict[str, str]:
    return dict(sorted(replacements.items(), key=lambda item: -len(item[0])))


def _shortened(path: re.Match[str]) -> str:
    name = re.split(r"[\\/]", path[0])[-1]
    # An image's or an archive's name may be a patient's.
    return f"<path>/{name}" if name.endswith(".py") else "<path>"


def _case_names(training: Training) -> set[str]:
    """The names of all cases, as far as files and splits_final.json tell. A short number is taken for a count."""
    names = set()
    for folder in _RAW_FOLDERS:
        names |= {re.sub(r"_\d{4}$", "", name) for name in _stems((training.raw / folder).glob("*"))}
    names |= {re.sub(r"_seg$", "", name) for name in _stems(training.preprocessed.glob("[!.]*/**/*"))}
    with contextlib.suppress(OSError):
        splits = (training.preprocessed / "splits_final.json").read_text(encoding="utf-8", errors="replace")
        names |= set(re.findall(r'"([^"]+)"', splits)) - {"train", "val", "unlabeled"}
    return {name for name in names if not re.fullmatch(r"\d{0,3}", name)}


def _stems(files: Iterable[Path]) -> set[str]:
    return {_ENDING.sub("", file.name) for file in files if file.is_file()}
