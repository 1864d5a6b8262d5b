"""The command line: ``app`` names the commands, a module each says what its commands do."""

from mhcplan.planner.cli.app import build_app, main

__all__ = ["build_app", "main"]
