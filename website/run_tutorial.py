"""Run a tutorial's commands in order, and write what they print, how long they took and their pictures into the page.

    python website/run_tutorial.py docs/tutorials/active-learning.md FOLDER \\
        --link nnUNet_raw/Dataset004_Hippocampus=SOURCE

The page is the source. Each block ```` ```bash ```` runs in FOLDER, with the variables that the blocks before it have
exported. FOLDER/nnunet-ssl is a link to this checkout. The block ```` ```text ```` after it gets the output. A comment
between the two, ``<!-- first 4 and last 9 lines -->``, shortens it. ``<!-- picture of FILE -->`` before an image copies
FILE; a pattern means the first file. Headless Chromium draws pages: ``<!-- picture of FILE, 1000 x 700 -->``. What lies
between ``<!-- times -->`` and ``<!-- end of times -->`` becomes a table of the times.

Run again, it goes on after the last block that has ended. Blocks that have run must not be edited; their outputs and
all other text may.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from nnunet_ssl.files import lock

PROJECT = Path(__file__).resolve().parents[1]
STATE = "tutorial.json"
LOCK = "tutorial.lock"
SHOWN_FOLDER = "/data/tutorial"
BLOCK = re.compile(
    r"^```bash\n(?P<command>.*?)^```\n"
    r"(?P<output>\n(?:<!-- (?P<shorten>[^>]* lines?) -->\n\n)?```text\n(?P<text>.*?)^```\n)?",
    re.MULTILINE | re.DOTALL,
)
PICTURE = re.compile(
    r"^<!-- picture of (?P<file>[^\s,]+)(?:, (?P<size>\d+ x \d+))? -->\n\n!\[[^\]]*\]\((?P<target>[^)]+)\)",
    re.MULTILINE,
)
TIMES = re.compile(r"^<!-- times -->\n.*?^<!-- end of times -->\n", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^## (.*)$", re.MULTILINE)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("folder", type=Path, help="to work in")
    parser.add_argument("--link", action="append", default=[], metavar="NAME=FOLDER", help="make this link in FOLDER")
    args = parser.parse_args()
    folder = args.folder.resolve()
    links = dict(one.split("=", 1) for one in args.link) | {"nnunet-ssl": str(PROJECT)}
    for name, target in links.items():
        link = folder / name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(Path(target).resolve())
    # A second run would start the block that the first is in once more.
    with lock(folder / LOCK, wait=False) as held:
        if not held:
            raise SystemExit(f"{folder} is in use by another run.")
        run(args.page, folder, sorted([str(folder), *(str(Path(target).resolve()) for target in links.values())]))


def run(page: Path, folder: Path, private: list[str]) -> None:
    """Run the blocks that have not ended yet; the page is written after each.

    Raises:
        SystemExit: a command failed, or a block that has run was edited.
    """
    file = folder / STATE
    done: list[dict[str, Any]] = json.loads(file.read_text()) if file.is_file() else []
    for number, block in enumerate(BLOCK.finditer(page.read_text(encoding="utf-8"))):
        command = block["command"]
        if number < len(done):
            if done[number]["command"] != command:
                raise SystemExit(f"Block {number} has changed since it was run:\n{command}Begin in an empty folder.")
            continue
        print(f"{time.strftime('%H:%M:%S')} block {number}:\n{command}", flush=True)
        done.append(run_block(command, folder))
        file.write_text(json.dumps(done, indent=1))
        write(page, done, folder, private)
    write(page, done, folder, private)


def run_block(command: str, folder: Path) -> dict[str, Any]:
    """Run one block in Bash.

    Returns:
        the command, what it printed, and how long it took: seconds, and seconds of processors.

    Raises:
        SystemExit: it failed.
    """
    variables = folder / "variables.sh"
    before = f"source {variables}\n" if variables.is_file() else ""
    script = f"set -eo pipefail\n{before}{command}export -p > {variables}\n"
    log = folder / "block.log"
    start, cpu = time.monotonic(), _cpu_seconds()
    with log.open("w") as output:
        code = subprocess.run(["bash", "-c", script], cwd=folder, stdout=output, stderr=subprocess.STDOUT).returncode
    printed = log.read_text()
    if code:
        raise SystemExit(f"{printed[-3000:]}\nThe block ended with {code}:\n{command}")
    return {
        "command": command,
        "printed": printed,
        "seconds": time.monotonic() - start,
        "cpu_seconds": _cpu_seconds() - cpu,
    }


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def write(page: Path, done: list[dict[str, Any]], folder: Path, private: list[str]) -> None:
    """Write outputs, pictures and times of the blocks that have ended into the page."""
    text = page.read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    parts, end = [], 0
    for block, result in zip(blocks, done, strict=False):
        parts.append(text[end : block.start()])
        shown = block[0]
        if block["output"]:
            output = shorten(clean(result["printed"], folder, private), block["shorten"] or "")
            head = block[0][: block.start("text") - block.start()]
            shown = f"{head}{output}```\n"
        parts.append(shown)
        end = block.end()
    ran_to = sum(map(len, parts))
    text = "".join(parts) + text[end:]
    for picture in PICTURE.finditer(text, 0, ran_to if len(done) < len(blocks) else len(text)):
        draw(sorted(folder.glob(picture["file"]))[0], page.parent / picture["target"], picture["size"])
    text = TIMES.sub(lambda _: f"<!-- times -->\n\n{times(text, done)}\n<!-- end of times -->\n", text)
    page.write_text(text, encoding="utf-8")


def clean(printed: str, folder: Path, private: list[str]) -> str:
    """An output without progress bars, warnings of libraries, and this machine's paths.

    Raises:
        SystemExit: a path of this machine is left.
    """
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in printed.splitlines()]
    kept = [line for line in lines if not re.search(r"\d+%\|.*\||Warning: |^ +warnings\.warn\(", line)]
    text = "\n".join(kept).strip("\n").replace(str(folder), SHOWN_FOLDER)
    for path in (*private, sys.prefix, str(PROJECT), str(Path.home())):
        if path in text:
            raise SystemExit(f"The output names a path of this machine, {path}:\n{text}")
    return f"{text}\n" if text else ""


def shorten(text: str, how: str) -> str:
    """The first and the last lines that ``how`` asks for, such as "first 4 and last 9 lines"."""
    lines = text.splitlines()
    first, last = (int(found[1]) if (found := re.search(rf"{end} (\d+)", how)) else 0 for end in ("first", "last"))
    if not how or first + last >= len(lines):
        return text
    return "\n".join([*lines[:first], "...", *(lines[-last:] if last else [])]) + "\n"


def draw(source: Path, target: Path, size: str | None) -> None:
    """Copy a picture, or draw a page."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.suffix != ".html":
        shutil.copyfile(source, target)
        return
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        raise SystemExit(f"There is no Chromium to draw {source} with.")
    assert size is not None, "give the size of the window"
    command = [
        *(chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=5000"),
        *(f"--window-size={size.replace(' x ', ',')}", f"--screenshot={target.resolve()}", source.resolve().as_uri()),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=120)


def times(text: str, done: list[dict[str, Any]]) -> str:
    """A table of the steps, each with the time that its blocks took."""
    steps: dict[str, list[float]] = {}
    headings = [(found.start(), found[1]) for found in HEADING.finditer(text)]
    for block, result in zip(BLOCK.finditer(text), done, strict=False):
        step = [name for start, name in headings if start < block.start()][-1]
        spent = steps.setdefault(step, [0.0, 0.0])
        spent[0] += result["seconds"]
        spent[1] += result["cpu_seconds"]
    steps["all"] = [sum(column) for column in zip(*steps.values(), strict=True)] if steps else [0.0, 0.0]
    rows = [f"| {step} | {spent[1] / 60:.1f} | {spent[0] / 60:.1f} |" for step, spent in steps.items()]
    return "\n".join(["| step | minutes of one core | minutes here |", "|---|---|---|", *rows, ""])


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    main()
