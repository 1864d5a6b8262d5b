"""mhcplan: what does mHC cost in this training run, and which schedule makes it cost least?

The names here are the public Python API. They load on first use (PEP 562), so that importing the
package costs nothing and the command line starts at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mhcplan.planner.api import compare, export, plan, predict, sweep

__version__ = "0.1.0"
__all__ = ["__version__", "compare", "export", "plan", "predict", "sweep"]

_HOME = dict.fromkeys(__all__[1:], "mhcplan.planner.api")


def __getattr__(name: str) -> object:
    """Import a public name from where it lives, on first use."""
    import importlib

    if name not in _HOME:
        raise AttributeError(f"module 'mhcplan' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
