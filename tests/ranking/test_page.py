"""The page, as Chromium shows it: sorted, filtered, with pictures, and nothing of a case's name is markup."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from nnunet_ssl.data.queue import FIRST, LOOK, RELIABLE, Model, Queue, Row, StructureRow, case_files
from nnunet_ssl.ranking.page import write_page
from nnunet_ssl.ranking.pictures import DISAGREEMENT, HEIGHT, draw, structure_colors

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EVIL = "<img src=x onerror=alert(1)>&'\" #1%41?"
LABELS = {"background": 0, "organ": 1, "<b>tumor</b>": 2}


def queue_of(cases, *, labels=LABELS, order=None) -> Queue:
    model = Model("CrossMatchTrainer", "nnUNetPlans", "3d_fullres", 0, "checkpoint_final.pth", "a" * 64)
    return Queue(
        "Dataset001_A", "3d_fullres", "nnUNetPlans", ".nii.gz", labels, order,
        {case: (f"{case}_0000.nii.gz",) for case in cases}, (model, model),
    )  # fmt: skip


def row(case: str, verdict: str, dice: float, queue: Queue, reason: str = "why") -> Row:
    structures = {name: StructureRow(dice, 10 * dice, 1) for name in queue.structures}
    return Row(case, verdict, reason, dice, 0.1, structures)


def a_case(shape=(12, 20, 24)) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, size) if size > 1 else np.zeros(1) for size in shape), indexing="ij")
    radius = np.sqrt(z**2 + y**2 + x**2)
    consensus = ((radius < 0.7).astype(np.uint8) + (radius < 0.35)).astype(np.uint8)
    disagreement = ((np.abs(radius - 0.7) < 0.08) & (x > 0)).astype(np.uint8)
    noise = np.random.default_rng(0).normal(0, 0.1, shape)
    return (1 - radius + noise).astype(np.float32), consensus, disagreement


@pytest.fixture
def page(tmp_path) -> Path:
    queue = queue_of([EVIL, "käse", "third"])
    rows = [
        row(EVIL, FIRST, 0.5, queue, "<script>alert(2)</script>"),
        row("käse", LOOK, 0.8, queue),
        row("third", RELIABLE, math.nan, queue),
    ]
    for one in rows:
        file = case_files(tmp_path, one.case, ".nii.gz").picture
        file.parent.mkdir(exist_ok=True)
        draw(file, *a_case(), queue.structures, (2.0, 1.0, 1.0))
    write_page(tmp_path, queue, rows, {"<i>broken</i>": "its file is empty"})
    return tmp_path / "index.html"


def test_nothing_is_loaded_from_elsewhere_and_no_name_is_markup(page) -> None:
    text = page.read_text()
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:|//|data:)|@import|url\(", text)
    table = text.split("<tbody>")[1].split("</tbody>")[0]
    tags = re.findall(r"<(?!/?(?:tr|td|span)\b)[^>]*>", table)
    assert len(tags) == 3
    assert all(re.fullmatch(r'<img loading="lazy" src="pictures/[^"<>]*" alt="[^"<>]*">', tag) for tag in tags)
    assert "&lt;script&gt;alert(2)" in text
    assert "&lt;i&gt;broken&lt;/i&gt;" in text
    assert "&lt;b&gt;tumor&lt;/b&gt;" in text


def in_chromium(page: Path, *arguments: str) -> str:
    """What a headless Chromium prints."""
    assert CHROMIUM is not None
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000",
        f"--user-data-dir={page.parent / 'chromium'}", "--allow-file-access-from-files", *arguments, page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


SCRIPT = """
<script>
window.onload = () => {
  const cells = column => [...document.querySelectorAll("tbody tr")].filter(row => !row.hidden)
    .map(row => row.cells[column].textContent);
  const head = name => [...document.querySelectorAll("th button")].find(one => one.textContent === name);
  document.querySelectorAll("img").forEach(image => image.loading = "eager");
  const found = {start: cells(1), markup: document.querySelectorAll("tbody script, tbody td b").length};
  head("Dice").click(); found.up = cells(1);
  head("Dice").click(); found.down = cells(1);
  head("case").click(); found.names = cells(1);
  const filters = [...document.querySelectorAll("[data-filter]")];
  filters[1].click(); found.first = cells(1); found.pressed = filters.map(one => one.getAttribute("aria-pressed"));
  filters[0].click(); found.all = cells(1).length;
  setTimeout(() => {
    found.pictures = [...document.querySelectorAll("img")].map(image => image.naturalHeight);
    const out = document.createElement("pre"); out.id = "found"; out.textContent = JSON.stringify(found);
    document.body.append(out);
  }, 1000);
};
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_the_page_in_chromium(page) -> None:
    tried = page.with_name("tried.html")
    tried.write_text(page.read_text().replace("</body>", SCRIPT + "</body>"))
    dom = in_chromium(tried, "--dump-dom")
    (text,) = re.findall(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)
    for entity, character in (("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&")):
        text = text.replace(entity, character)
    found = json.loads(text)
    assert found["start"] == [EVIL, "käse", "third"]
    assert found["markup"] == 0
    assert found["up"] == [EVIL, "käse", "third"]
    assert found["down"] == ["käse", EVIL, "third"]  # what is not known stays last
    assert sorted(found["names"]) == sorted([EVIL, "käse", "third"])
    assert found["names"][1:] == ["käse", "third"]
    assert found["first"] == [EVIL]
    assert found["pressed"] == ["false", "true", "false", "false"]
    assert found["all"] == 3
    assert found["pictures"] == [HEIGHT] * 3


def test_a_picture_has_three_slices_with_contours_and_disagreement(tmp_path) -> None:
    image, consensus, disagreement = a_case()
    draw(tmp_path / "a.png", image, consensus, disagreement, {"organ": [1, 2], "tumor": 2}, (2.0, 1.0, 1.0))
    picture = matplotlib.image.imread(tmp_path / "a.png")[..., :3]
    # Rows and columns in millimeters: 20 x 24, 24 x 24, 24 x 20.
    width = sum(round(HEIGHT * columns / rows) for rows, columns in ((20, 24), (24, 24), (24, 20))) + 2 * 6
    assert picture.shape == (HEIGHT, width, 3)
    for color in structure_colors(["organ", "tumor"]).values():
        rgb = np.array([int(color[index : index + 2], 16) / 255 for index in (1, 3, 5)])
        assert (np.abs(picture - rgb).max(axis=2) < 0.01).sum() > 200
    purple = (picture[..., 0] - picture[..., 1] > 0.2) & (picture[..., 2] - picture[..., 1] > 0.2)
    assert purple.sum() > 100
    draw(tmp_path / "b.png", image, consensus, np.zeros_like(disagreement), {"organ": [1, 2]}, (2.0, 1.0, 1.0))
    other = matplotlib.image.imread(tmp_path / "b.png")[..., :3]
    assert not ((other[..., 0] - other[..., 1] > 0.2) & (other[..., 2] - other[..., 1] > 0.2)).any()
    assert DISAGREEMENT == "#ff00ff"


@pytest.mark.parametrize("shape", [(1, 20, 24), (3, 1, 5), (1, 1, 1)])
def test_flat_images_have_a_picture(tmp_path, shape) -> None:
    draw(tmp_path / "a.png", *a_case(shape), {"organ": [1, 2]}, (1.0, 1.0, 1.0))
    picture = matplotlib.image.imread(tmp_path / "a.png")
    assert picture.shape[0] == HEIGHT
