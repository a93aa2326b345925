"""The site builds strictly, has all pages, and what is written for GitHub looks as meant on it."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def build(folder: Path, config: Path = ROOT / "mkdocs.yml") -> subprocess.CompletedProcess[str]:
    """As ``make docs`` does, into another folder."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(config)]
    return subprocess.run(
        [*command, "--site-dir", str(folder)],
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert done.returncode == 0, done.stderr
    return folder


class Text(HTMLParser):
    """The paragraphs of a page, and what it loads."""

    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: list[str] = []
        self.loads: list[str] = []
        self.links: list[str] = []
        self.inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in {"script", "img"} or (tag == "link" and given.get("rel") == "stylesheet"):
            self.loads.append(given.get("src") or given.get("href") or "")
        if tag == "a" and given.get("href"):
            self.links.append(given["href"] or "")
        if tag == "p":
            self.inside = True
            self.paragraphs.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag != "p"

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.paragraphs[-1] += data


def read(page: Path) -> Text:
    found = Text()
    found.feed(page.read_text(encoding="utf-8"))
    return found


def test_every_document_is_a_page(site: Path) -> None:
    documents = {p.relative_to(ROOT / "docs") for p in (ROOT / "docs").rglob("*.md")}
    expected = {
        p.with_name("index.html" if p.name == "README.md" else f"{p.stem}.html") for p in documents
    }
    expected |= {Path("notebooks", f"{p.stem}.html") for p in (ROOT / "docs").rglob("*.ipynb")}
    expected |= {Path(name) for name in ("overview.html", "changelog.html", "contributing.html")}
    found = {p.relative_to(site) for p in site.rglob("*.html")} - {Path("404.html")}
    assert expected <= found


def test_no_list_and_no_table_is_left_as_text(site: Path) -> None:
    """Python-Markdown wants an empty line before a list or a table, GitHub does not."""
    wrong = re.compile(r"\n\s*(?:[-*] |\d+\. |\|.*\|\s*$)|\|[-:]{3,}\||```|<!--", re.MULTILINE)
    found = [
        (page.name, text[:80])
        for page in site.rglob("*.html")
        if "notebooks" not in page.parts
        for text in read(page).paragraphs
        if wrong.search(text)
    ]
    assert found == []


def test_every_link_of_every_page_leads_somewhere(site: Path) -> None:
    """Those of notebooks too, which the strict build does not look at."""
    wrong = []
    for page in site.rglob("*.html"):
        targets = {link.partition("#")[0] for link in read(page).links if ":" not in link}
        wrong += [(page.name, t) for t in targets if t and not (page.parent / t).exists()]
    assert [each for each in wrong if each[0] != "404.html"] == []


def test_the_first_page_has_both_pictures_and_loads_nothing_from_elsewhere(site: Path) -> None:
    loads = read(site / "index.html").loads
    pictures = [each for each in loads if each.endswith(".png") and "assets" not in each]
    assert pictures == ["pictures/idea.png", "pictures/speed_fidelity.png"]
    assert all((site / each).stat().st_size > 10_000 for each in pictures)
    assert [each for each in loads if "//" in each] == []


@pytest.mark.parametrize("link", ["nowhere.md", "policy.md#nowhere"])
def test_a_wrong_link_fails(tmp_path: Path, link: str) -> None:
    """In a small copy of the site: one page with a link."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"[here]({link})\n")
    (tmp_path / "docs" / "policy.md").write_text("# Policy\n")
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    settings = settings.partition("\nnav:")[0].replace("hooks: [docs/hooks.py]", "")
    (tmp_path / "mkdocs.yml").write_text(settings)
    done = build(tmp_path / "site", tmp_path / "mkdocs.yml")
    assert done.returncode != 0
    assert link.partition("#")[2] in done.stderr


def hooks() -> Any:
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_links_of_documents_become_links_of_pages() -> None:
    rewritten = hooks().rewritten
    assert rewritten("[a](docs/policy.md#rules)", "README.md") == "[a](policy.md#rules)"
    assert rewritten("[a](../README.md)", "docs/policy.md") == "[a](overview.md)"
    assert rewritten("[a](../policy.md)", "docs/using/export.md") == "[a](../policy.md)"
    assert rewritten("[`op`](../Makefile), [b](#x)", "docs/policy.md") == "`op`, [b](#x)"
    assert rewritten("[a](https://x.org)", "README.md") == "[a](https://x.org)"
    assert rewritten("![a](cpu_speed.png)", "docs/kernels.md") == "![a](cpu_speed.png)"
    with pytest.raises(FileNotFoundError, match=r"docs/policy\.md: got a link to gone\.md"):
        rewritten("[a](gone.md)", "docs/policy.md")
