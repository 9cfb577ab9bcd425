"""A hook of mkdocs: brings what lies outside docs/ into the site, and leads links to it.

The home page is README.md, and every plugin's README is a page. Any other text file of the repository to which a page
links gets a page that shows its text. So every link that works in a checkout works on the site, which needs no other.
READMEs are read elsewhere, too: the addresses of this repository's files in them lead to the site's pages.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[2]
DOCS = "docs/"
LINK = re.compile(r"(?:(?<=\]\()|(?<=\]: ))(?!https?:|mailto:|#)([^)\s#]+)(?=[)\s#]|$)", re.MULTILINE)
REPOSITORY = re.compile(
    r"https://(?:github\.com/psyche-lightning/psyche_lightning/blob"
    r"|raw\.githubusercontent\.com/psyche-lightning/psyche_lightning)/main/"
)
FENCE = re.compile(r"^(```)([\w+-]*) +(.+)$", re.MULTILINE)
BLOCK = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".c": "c", ".h": "c", ".sh": "bash"}


def page_of(path: str) -> str:
    """The page of the site, relative to docs/, that shows a file of the repository."""
    if path == "README.md":
        return "index.md"
    if re.fullmatch(r"plugins/[\w-]+/README\.md", path):
        return f"{PurePosixPath(path).parent}.md"
    if path.startswith(DOCS):
        return path.removeprefix(DOCS)
    return f"files/{path.removesuffix('.md')}.md"


def targets(source: str, text: str) -> set[str]:
    """The files of the repository to which the page at ``source`` links, as paths from its root."""
    folder = str(PurePosixPath(source).parent)
    return {normpath(f"{folder}/{target}") for target in LINK.findall(BLOCK.sub("", relative(source, text)))}


def relative(source: str, text: str) -> str:
    """``text`` with addresses of this repository's files as paths from the page at ``source``."""
    return REPOSITORY.sub("../" * (len(PurePosixPath(source).parts) - 1), text)


def on_files(files: Files, *, config: Any) -> Files:
    """Add the pages that lie outside docs/."""
    sources = {f"{DOCS}{file.src_uri}": file for file in files.documentation_pages()}
    pending = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("plugins/*/README.md")), *sources]
    seen = set(pending)
    while pending:
        source = pending.pop()
        if source not in sources:
            page = page_of(source)
            inclusion = InclusionLevel.NOT_IN_NAV if page.startswith("files/") else InclusionLevel.UNDEFINED
            files.append(File.generated(config, page, content=_text(source), inclusion=inclusion))
        if source.endswith(".md"):
            found = {path for path in targets(source, (ROOT / source).read_text()) if _shown(path)} - seen
            seen |= found
            pending += sorted(found)
    return files


def _shown(path: str) -> bool:
    return not path.startswith(DOCS) and (ROOT / path).is_file()


def _text(source: str) -> str:
    text = (ROOT / source).read_text()
    if source.endswith(".md"):
        return text
    language = LANGUAGES.get(PurePosixPath(source).suffix, "text")
    return f"---\nsearch: {{exclude: true}}\n---\n# `{source}`\n\n````{language}\n{text.rstrip()}\n````\n"


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Lead links to pages of the site, and make titles of the names under which readers save blocks."""
    here = page.file.src_uri
    sources = {page_of(path): path for path in _outside(files)}
    source = sources.get(here, f"{DOCS}{here}")
    if not source.endswith(".md"):
        return markdown

    def lead(match: re.Match[str]) -> str:
        path = normpath(f"{PurePosixPath(source).parent}/{match[1]}")
        return relpath(page_of(path), str(PurePosixPath(here).parent))

    markdown = relative(source, markdown)
    parts, end = [], 0
    for block in BLOCK.finditer(markdown):
        parts += [LINK.sub(lead, markdown[end : block.start()]), FENCE.sub(_title, block[0], count=1)]
        end = block.end()
    return "".join([*parts, LINK.sub(lead, markdown[end:])])


def _outside(files: Files) -> list[str]:
    """The files outside docs/ that have a page."""
    found = ["README.md", *(str(path.relative_to(ROOT)) for path in ROOT.glob("plugins/*/README.md"))]
    pages = [file.src_uri.removeprefix("files/") for file in files if file.src_uri.startswith("files/")]
    return found + [name for page in pages for name in (page, page.removesuffix(".md")) if (ROOT / name).is_file()]


def _title(match: re.Match[str]) -> str:
    name = re.search(r"file=(\S+)", match[3])
    return f"{match[1]}{match[2]}" + (f' title="{name[1]}"' if name else "")
