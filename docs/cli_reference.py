"""Hook of mkdocs: the page of all commands, made from the command line when a site is built."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mkdocs.structure.files import File

from mhcplan.planner.cli import build_app

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add ``cli.md``."""
    files.append(File.generated(config, "cli.md", content=build_app().generate_docs()))
    return files
