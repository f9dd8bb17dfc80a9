"""MkDocs hooks: pages that lie outside ``docs/``, and links that leave it.

A page links to files of the repository by relative paths, so that it can be read there. On the site, a link to another
page leads to that page. A link to any other file of the repository leads to the repository where ``project.urls`` in
pyproject.toml names it as ``Repository``, and is plain text otherwise. A link to nothing stays, and so does a picture
that is not below ``docs/``, so that ``mkdocs build --strict`` refuses them.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
# Source, and the name it has on the site.
PAGES = {"README.md": "index.md"} | {name: name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^)\s]+)\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Take the repository's address from pyproject.toml, if it is there."""
    # By pattern, since Python 3.10 has no tomllib.
    metadata = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'^Repository = "(https://[^"]+?)/?"', metadata, re.MULTILINE)
    config.repo_url = found[1] if found else None
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside ``docs/``."""
    results = sorted((ROOT / "benchmarks").rglob("*.md"))
    pages = PAGES | {path.relative_to(ROOT).as_posix(): path.relative_to(ROOT).as_posix() for path in results}
    for source, name in pages.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links of the site."""
    assert page.file.abs_src_path is not None
    folder = Path(page.file.abs_src_path).parent
    here = posixpath.dirname(page.file.src_uri) or "."
    names = {Path(file.abs_src_path).resolve(): file.src_uri for file in files if file.abs_src_path}

    def on_the_site(link: re.Match[str]) -> str:
        image, text, target = link.groups()
        path, mark, anchor = target.partition("#")
        linked = (folder / path).resolve()
        if not path or "://" in path or not linked.exists() or ROOT not in linked.parents:
            return link[0]
        if linked in names:
            return f"{image}[{text}]({posixpath.relpath(names[linked], here)}{mark}{anchor})"
        if image:
            return link[0]
        if config.repo_url:
            return f"[{text}]({config.repo_url}/blob/HEAD/{linked.relative_to(ROOT).as_posix()}{mark}{anchor})"
        return text

    return LINK.sub(on_the_site, markdown)
