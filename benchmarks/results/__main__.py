"""Print tables of results, or write all of them: ``python -m benchmarks.results --write``."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.results import document

DOCUMENT = Path(__file__).parents[2] / "docs" / "results.md"


def main() -> None:
    """Print what is asked for, or write the document."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.results", description=__doc__)
    known = ", ".join(document.SECTIONS)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {known}; default all")
    parser.add_argument("--write", action="store_true", help=f"write {DOCUMENT.name} instead")
    parser.add_argument("--profile", default="h100-sxm", help="shipped profile, or a file")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(document.SECTIONS):
        parser.error(f"NAME={min(unknown)} must be one of {known}")
    if arguments.write:
        DOCUMENT.write_text(document.text(arguments.profile), encoding="utf-8")
        return
    for name in arguments.names or document.SECTIONS:
        print(document.section(name, arguments.profile))


if __name__ == "__main__":
    main()
