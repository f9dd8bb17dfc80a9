"""The documentation site: it builds without a warning, its pages lead somewhere, and it shows the API."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from nnunet_ssl import api

PROJECT = Path(__file__).resolve().parents[1]
SOURCES = ("mkdocs.yml", "pyproject.toml", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
FOLDERS = ("docs", "website", "benchmarks", "nnunet_ssl")


def _build(project: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    return subprocess.run(command, cwd=project, capture_output=True, encoding="utf-8")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    result = _build(PROJECT, folder)
    assert result.returncode == 0, f'pip install ".[docs]" installs MkDocs.\n{result.stdout}{result.stderr}'
    return folder


class _Page(HTMLParser):
    """The anchors of a page, and the addresses that it leads to (links) or loads from (resources)."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.resources: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if "href" in given and tag == "a":
            self.links.add(given["href"])
        elif given.get("rel") != "canonical":
            self.resources |= {given[name] for name in ("href", "src") if name in given}


def _pages(site: Path) -> dict[Path, _Page]:
    return {path: _Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html") if path.name != "404.html"}


def _dead_ends(site: Path) -> Iterator[str]:
    pages = _pages(site)
    assert len(pages) > 30
    for path, page in pages.items():
        for address in page.links | page.resources:
            parts = urlsplit(address)
            if parts.scheme in ("http", "https", "mailto"):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir():
                target /= "index.html"
            if not target.is_file():
                yield f"{path.relative_to(site)}: {address} is no file"
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                yield f"{path.relative_to(site)}: {address} is no anchor"


def test_every_link_leads_somewhere(site: Path) -> None:
    assert list(_dead_ends(site)) == []


def test_a_page_loads_nothing_from_elsewhere(site: Path) -> None:
    """So it can be read offline, and reading it tells nobody."""
    loaded = {address for page in _pages(site).values() for address in page.resources}
    assert loaded
    assert [address for address in loaded if urlsplit(address).netloc] == []


def test_the_api_has_signatures_texts_and_examples(site: Path) -> None:
    text = (site / "reference" / "api" / "index.html").read_text(encoding="utf-8")
    headings = re.split(r'<h3 id="nnunet_ssl\.api\.', text)[1:]
    sections = {heading.split('"')[0]: heading for heading in headings}
    assert sorted(sections) == api.__all__
    plain = {name: re.sub(r"<[^>]+>", "", section) for name, section in sections.items()}
    assert [name for name in plain if name != "UNet" and "&gt;&gt;&gt;" not in plain[name]] == []
    signature, description = plain["masked_dice_loss"].split("Soft Dice loss over the masked voxels")
    assert "epsilon: float = 1e-05,\n) -&gt; Tensor" in signature
    assert "(B, K, *spatial), float." in description
    assert "cutmix_probability: float = 0.5,\n" in plain["CutMixSettings"]
    assert "<blockquote>" not in text, "an example became a quotation"
    assert "<strong>[choice]</strong>" in text and "*[choice]" not in text


def test_links_that_leave_the_pages() -> None:
    from mkdocs.config import load_config
    from mkdocs.structure.files import get_files
    from mkdocs.structure.pages import Page

    config = load_config(str(PROJECT / "mkdocs.yml"))
    files = config.plugins.run_event("files", get_files(config), config=config)
    page = Page(None, files.get_file_from_path("explanation/cps.md"), config)

    def on_the_site(text: str) -> str:
        return config.plugins.run_event("page_markdown", text, page=page, config=config, files=files)

    source, gone = "[`cps.py`](../../nnunet_ssl/methods/cps.py)", "[gone](../../nnunet_ssl/gone.py)"
    config.repo_url = None
    assert on_the_site(source) == "`cps.py`"
    config.repo_url = "https://example.org/project"
    assert on_the_site(source) == "[`cps.py`](https://example.org/project/blob/HEAD/nnunet_ssl/methods/cps.py)"
    assert on_the_site("[a [b]](../../README.md#use-it)") == "[a [b]](../index.md#use-it)"
    assert on_the_site("[c](../../benchmarks/README.md)") == "[c](../benchmarks/README.md)"
    assert on_the_site("![h](../leaderboard.md)") == "![h](../leaderboard.md)"
    for unchanged in (
        gone,
        "![i](../../LICENSE)",
        "[d](dtc.md#idea)",
        "[e](#idea)",
        "[f](https://example.org/README.md)",
        "[g](../../../h)",
    ):
        assert on_the_site(unchanged) == unchanged


def test_a_mistake_ends_the_build(tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    for name in FOLDERS:
        shutil.copytree(PROJECT / name, project / name, ignore=shutil.ignore_patterns("__pycache__", "api.md"))
    for name in SOURCES:
        shutil.copy(PROJECT / name, project)
    mistakes = {
        "docs/leaderboard.md": "[a page](explanation/no-such-page.md) [an anchor](leaderboard.md#no-such-anchor)",
        "docs/how-to/pilot.md": "[a source](../../nnunet_ssl/no_such_module.py) [a result](../../benchmarks/none.md)",
        "CHANGELOG.md": "[security](SECURITY.md#no-such-heading)",
        "docs/forgotten.md": "# A page that is not in the navigation",
    }
    for name, text in mistakes.items():
        with (project / name).open("a", encoding="utf-8") as file:
            file.write(f"\n\n{text}\n")
    result = _build(project, tmp_path / "site")
    assert result.returncode == 1
    for named in (
        *("no-such-page.md", "no-such-anchor", "no_such_module.py", "none.md", "no-such-heading", "forgotten.md"),
        "reference/api.md",
    ):
        assert re.search(rf"WARNING.*(\n.*)?{re.escape(named)}", result.stderr), f"{named}\n{result.stderr}"
