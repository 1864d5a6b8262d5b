"""Hooks of mkdocs: what a page of the site has that its Markdown file has not."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from mkdocs.structure.files import File

from mhcplan.planner.cli import build_app

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add ``cli.md``, the page of all commands, as the command line itself has them today."""
    files.append(File.generated(config, "cli.md", content=build_app().generate_docs()))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Keep the language of a code block and drop what says to tests how to run it."""
    return re.sub(r"^```(\w+) .*$", r"```\1", markdown, flags=re.MULTILINE)


def on_page_content(html: str, **_: object) -> str:
    """Show the roles of docstrings (:class: and the like) as what they name."""
    role = r":(?:class|func|mod|data):<code>(?:~[\w.]+\.)?([\w.]+)</code>"
    return re.sub(role, r"<code>\1</code>", html)
