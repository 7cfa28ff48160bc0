"""The commands, links, anchors and settings of README.md, CONTRIBUTING.md and docs/ exist."""

from __future__ import annotations

import re
import shlex
import unicodedata
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import yaml

import moedge
from moedge.runtime.cli import COMMANDS, load

ROOT = Path(moedge.__file__).parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "tests" / "README.md", *DOCS]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
LINE = re.compile(r"^ *(?:\$ |- run: )?(?:\.venv/bin/)?moedge +([a-z][a-z-]*)(.*)$", re.MULTILINE)
FENCE = re.compile(r"^ *```(\w*)[^\n]*\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
OPTIONS = {name: {option for parameter in load(name).params for option in parameter.opts} for name in COMMANDS}


@lru_cache
def prose(page: Path) -> str:
    """The page without its blocks of code."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


@lru_cache
def anchors(page: Path) -> set[str]:
    """What a link to the page may name: headings as GitHub and as the site's generator turn them into anchors."""
    headings = [re.sub(r"[`*]", "", line) for line in re.findall(r"^#{1,6} +(.+?) *$", prose(page), re.MULTILINE)]
    github = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
    plain = [unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode() for heading in headings]
    site = [re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in plain]
    return {name for name in github if name in site and github.count(name) == 1}


def test_an_anchor_is_one_on_github_and_on_the_site(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# `a` of b: 2\n## 12.5 % of c\n## Twice\n## Twice\n```sh\n# no heading\n```\n", encoding="utf-8")
    assert anchors(page) == {"a-of-b-2"}  # "12.5 %" leaves two hyphens on GitHub and one on the site


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_link_leads_to_a_page_and_a_heading(page: Path) -> None:
    missing = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if "://" not in link and (not target.exists() or (anchor and anchor not in anchors(target))):
            missing.append(link)
    assert not missing


@pytest.mark.parametrize("page", DOCS, ids=[page.name for page in DOCS])
def test_a_page_of_the_site_links_to_pages_of_the_site_only(page: Path) -> None:
    assert not [link for link in re.findall(r"\]\((\.\./[^)\s]*)", prose(page)) if link]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_file_of_the_code_that_a_page_names_exists(page: Path) -> None:
    named = re.findall(r"`((?:configs|convert|export|runtime|tests)/[\w/.-]+(?:\.\w+|/))[`:]", prose(page))
    assert [path for path in named if not ((ROOT / path).exists() or (page.parent / path).exists())] == []


def test_every_command_line_has_a_command_and_its_options() -> None:
    found = []
    for page in PAGES:
        for name, rest in LINE.findall(page.read_text(encoding="utf-8").replace("\\\n", " ")):
            words = shlex.split(rest, comments=True)
            found.append(name)
            assert name in OPTIONS, f"{page.name}: moedge {name}"
            unknown = {word.partition("=")[0] for word in words if word.startswith("--")} - OPTIONS[name]
            assert not unknown, f"{page.name}: moedge {name} has no {', '.join(unknown)}"
    assert set(found) >= set(OPTIONS), "every command is shown somewhere"


def test_every_block_of_yaml_can_be_read() -> None:
    for page in PAGES:
        for language, block in FENCE.findall(page.read_text(encoding="utf-8")):
            if language in ("yaml", "yml"):
                assert yaml.safe_load(block), page.name


def test_the_site_shows_every_page_once() -> None:
    def pages(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in pages(part)]

    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert sorted(pages(nav)) == [page.name for page in DOCS]
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert [page.name for page in DOCS if page.name != "index.md" and f"]({page.name})" not in index] == []


def test_what_the_code_cites_of_the_docs_is_there() -> None:
    """``docs/methods.md 1.4`` in a docstring is a page with a heading of that number."""
    cited = re.compile(r"docs/([a-z-]+)\.md((?: \d+(?:\.\d+)?,?)*)")
    elsewhere = re.compile(r"(?<![\w/-])(?:methods|peers|assets|design|structure)\.md")
    found, missing = 0, []
    for part in ("configs", "convert", "export", "runtime", "tests"):
        for path in sorted((ROOT / part).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            if path != Path(__file__) and elsewhere.search(text):
                missing.append(f"{path.relative_to(ROOT)} cites a page outside docs/")
            for name, sections in cited.findall(text):
                page = ROOT / "docs" / f"{name}.md"
                numbers = re.findall(r"^#+ (\d+(?:\.\d+)?)\.? ", prose(page), re.MULTILINE) if page.exists() else []
                found += 1
                wanted = re.findall(r"\d+(?:\.\d+)?", sections)
                if not page.exists() or not set(wanted) <= set(numbers):
                    missing.append(f"{path.relative_to(ROOT)}: docs/{name}.md{sections}")
    assert found > 30
    assert missing == []


def test_readme_shows_what_make_runs() -> None:
    """Its plain commands for the demo and the tests are those of the Makefile."""
    readme, makefile = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "Makefile"))
    for target in ("demo", "test"):
        (line,) = re.findall(rf"^{target}:.*\n\t(.+)$", makefile, re.MULTILINE)
        assert line.replace("$(BIN)", ".venv/bin") in readme
    assert len(readme.split()) < 1100
