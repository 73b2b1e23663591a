"""What readers open: links lead somewhere, the site builds, one version everywhere."""

import importlib
import os
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

import jupytext
import pytest
import yaml
from conftest import ROOT, Page
from markdown_it import MarkdownIt

import allo_lib

PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "notebooks/*.py", "results/**/*.md", "results/*.html")
    for path in ROOT.glob(pattern)
    if "/." not in path.relative_to(ROOT).as_posix()  # a store
)


@cache
def page_of(path: Path) -> Page:
    """Of a Markdown file or a notebook by way of HTML, with the anchors that GitHub makes."""
    if path.suffix == ".html":
        return Page(path.read_text(encoding="utf-8"))
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        cells = jupytext.reads(text, fmt="py:percent").cells
        text = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    markdown = MarkdownIt().enable("table")
    found, tokens = Page(markdown.render(text)), markdown.parse(text)
    for opening, inline in zip(tokens, tokens[1:], strict=False):
        if opening.type == "heading_open":
            words = "".join(part.content for part in inline.children)
            anchor = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
            found.attributes.append(("id", anchor))
    return found


def broken(path: Path) -> list[str]:
    """One line for every link of the page that leads nowhere; no network is used."""
    problems = []
    for target in page_of(path).values("href", "src"):
        url = urlsplit(target)
        where = (path.parent / unquote(url.path)).resolve() if url.path else path
        if url.scheme == "data":
            continue
        if url.scheme or url.netloc:
            if url.scheme not in ("http", "https") or not re.fullmatch(r"[\w.-]+\.\w+", url.netloc):
                problems.append(f"{target}: no well-formed address")
        elif not where.exists() or not where.is_relative_to(ROOT):
            problems.append(f"{target}: no such file")
        elif url.fragment and url.fragment not in page_of(where).values("id"):
            problems.append(f"{target}: no such heading")
    return problems


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    assert broken(path) == []


def test_one_version_everywhere_and_a_citation_with_what_its_format_asks_for():
    """The required keys of CFF 1.2.0, and the paper that is reproduced."""
    version = allo_lib.__version__
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert project["version"] == citation["version"] == version
    assert f"version = {{{version}}}" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"## {version} " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")

    assert citation["cff-version"] == "1.2.0"
    assert citation["message"] and citation["title"] and citation["authors"]
    paper = citation["preferred-citation"]
    assert {"type", "title", "authors"} <= set(paper) and "2406.12606" in paper["url"]


def test_what_the_library_page_names_is_imported_from_the_library_itself():
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    named = re.findall(r"^::: allo_lib\.((?:method|delta|align)[\w.]*)\.(\w+)$", text, re.MULTILINE)
    assert {name for _, name in named} == {*allo_lib.__all__}
    for module, name in named:
        own = getattr(importlib.import_module(f"allo_lib.{module}"), name)
        assert getattr(allo_lib, name) is own


@pytest.mark.site
def test_the_site_builds_without_warnings(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", tmp_path]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    for page in ("", "docs/method/", "notebooks/03_forgetting/", "results/", "CONTRIBUTING/"):
        assert "<h1" in (tmp_path / page / "index.html").read_text(encoding="utf-8")
    api = page_of(tmp_path / "docs" / "api" / "index.html").values("id")
    shown = {anchor.rpartition(".")[2] for anchor in api}
    assert set(allo_lib.__all__) <= shown, "docs/api.md lacks a name that allo_lib exports"
