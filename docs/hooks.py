"""What turns the documents of this repository into the pages of the site (``mkdocs.yml``).

Files outside of ``docs`` that people read become pages, too. A link to any other file outside keeps
its text only: the site has no copy of the sources, and they have no public address.
"""

from __future__ import annotations

import os.path
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]

PAGES = {
    "README.md": "overview.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "tests/zoo/README.md": "zoo.md",
}
"""Files of the repository -> pages that are made of them."""

USING = "Using it with ..."
"""The part of the menu that takes every page of ``docs/using``."""

LINK = re.compile(r"(?<!!)\[((?:[^][]|\[[^][]*\])*)\]\(([^)#\s]*)(#[^)\s]*)?\)")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def on_config(config: Any) -> Any:
    """Give the menu the pages of ``docs/using``, by their titles."""
    (part,) = (each for each in config.nav if isinstance(each, dict) and USING in each)
    for path in sorted((ROOT / "docs" / "using").glob("[!A-Z]*.md")):
        title = path.read_text(encoding="utf-8").partition("\n")[0]
        part[USING].append({title.removeprefix("# Using it with "): f"using/{path.name}"})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of files that lie elsewhere."""
    for source, page in PAGES.items():
        content = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite the links of a page."""
    origins = {made: source for source, made in PAGES.items()}
    origin = origins.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    parts, end = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [rewritten(markdown[end : fence.start()], origin), fence[0]]
        end = fence.end()
    return "".join([*parts, rewritten(markdown[end:], origin)])


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Give links of notebooks, which are made without the hook above, the names of pages."""
    if not page.file.src_uri.endswith(".ipynb"):
        return html
    return re.sub(r'(href="(?![a-z]+:)[^"#]*)\.(?:md|ipynb)(["#])', r"\1.html\2", html)


def rewritten(text: str, origin: str) -> str:
    """Links of a file of the repository as they are right for its page.

    Raises:
        FileNotFoundError: a link leads to no file.
    """
    folder = os.path.dirname(origin)
    here = os.path.dirname(place(origin) or "")

    def replace(match: re.Match[str]) -> str:
        label, target, anchor = match[1], match[2], match[3] or ""
        if not target or "://" in target:
            return match[0]
        file = os.path.normpath(os.path.join(folder, target))
        if not (ROOT / file).exists():
            raise FileNotFoundError(f"{origin}: got a link to {target}; there is no such file")
        made = place(file)
        if made is None:
            return label
        return f"[{label}]({os.path.relpath(made, here or '.')}{anchor})"

    return LINK.sub(replace, text)


def place(file: str) -> str | None:
    """Where the site has a file of the repository, or None."""
    if file in PAGES:
        return PAGES[file]
    inside = file.startswith("docs/") and (ROOT / file).is_file()
    return file.removeprefix("docs/") if inside else None
