"""The command line: names every command, imports none until it is called.

Commands live with what they do and are named here by import string, so that the capture (which
needs torch) and the planner are loaded only when asked for. A command returns its exit code (None
is 0). Bad input of any kind ends here as one line on stderr and exit code 2; an error that is not
bad input is a bug and keeps its traceback.
"""

from __future__ import annotations

import atexit
import errno
import gc
import os
import sys
from typing import TYPE_CHECKING, Any, NoReturn

import mhcplan
from mhcplan.planner.cli.examples import EXAMPLES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cyclopts import App, UnknownOptionError

BAD_INPUT = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells have it
BROKEN_PIPE = 141  # 128 + SIGPIPE

_EXTRAS = {  # of the modules that only some commands need
    **dict.fromkeys(("torch", "triton"), "gpu"),
    **dict.fromkeys(("optuna", "pyarrow"), "sweep"),
    **dict.fromkeys(("dask", "distributed", "ray"), "cluster"),
    **dict.fromkeys(("fastapi", "starlette", "uvicorn", "pebble"), "web"),
}

_HELP = """\
What does mHC cost in this training run, and which schedule makes it cost least?

Predicts time and memory of a training step from measured kernel and network times; no GPU needed.

    mhcplan predict mhc-27b --n 4 --pp 8 --microbatches 64
    mhcplan predict mhc-9b --schedule 1f1b --json
    mhcplan init mhc-27b -o plan.toml
    mhcplan predict plan.toml --set layout.gpus_per_node=4 --out out/
"""

_COMMANDS = {
    "predict": (
        "mhcplan.planner.cli.predict:predict",
        "Predict a step: overhead, time, memory, and whether it fits.",
    ),
    "sweep": (
        "mhcplan.planner.cli.sweep:sweep",
        "Predict every combination of lists of values: any field, a table, resumable.",
    ),
    "plan": (
        "mhcplan.planner.cli.sweep:plan",
        "Find the plan of the fastest step on given GPUs, and say how far that is proven.",
    ),
    "export": (
        "mhcplan.planner.cli.predict:export",
        "Write a predicted step in another tool's format.",
    ),
    "check": (
        "mhcplan.planner.cli.check:check",
        "Prove a stream program or a torch CSV sound: no hang, no race, nothing missing.",
    ),
    "compare": (
        "mhcplan.planner.cli.compare:compare",
        "Lay two plans, reports or traces side by side: what changed, and what it did.",
    ),
    "explain": (
        "mhcplan.planner.cli.compare:explain",
        "Say in words why a step takes as long as it does, and what would help.",
    ),
    "run": (
        "mhcplan.planner.cli.run:run",
        "Train steps of a plan on this machine's GPUs, timed beside the prediction.",
    ),
    "diagnose": (
        "mhcplan.planner.cli.diagnose:diagnose",
        "Say what mHC or HC did in a training run: gains, mixing, collapse, alarms.",
    ),
    "web": (
        "mhcplan.web.commands:web",
        "Open the what-if page: sliders, and the answer as they move. Works offline.",
    ),
    "init": ("mhcplan.planner.cli.predict:init", "Write a plan file with comments, to be edited."),
}
_GROUPS = {  # in the order of the help, as are their commands
    "Ask": ("predict", "explain", "compare", "sweep", "plan", "web"),
    "Plans and programs": ("init", "export", "check"),
    "On GPUs": ("profile", "run", "diagnose"),
}
_PROFILE_COMMANDS = {
    "list": ("mhcplan.planner.cli.profile:list_", "List the shipped profiles."),
    "show": ("mhcplan.planner.cli.profile:show", "Show what a profile measured, and how."),
    "validate": (
        "mhcplan.planner.cli.profile:validate",
        "Check a profile file: every problem, one a line.",
    ),
    "overlap": (
        "mhcplan.planner.cli.overlap:overlap",
        "Price any op beside any traffic: how much each slows the other, and why.",
    ),
    "diff": (
        "mhcplan.planner.cli.profile:diff",
        "Compare two profiles figure by figure.",
    ),
}


def build_app() -> App:
    """The command tree; nothing behind it is imported yet."""
    from cyclopts import App, Group, Parameter

    from mhcplan.planner.cli.values import value_of

    app = App(
        name="mhcplan",
        help=_HELP,
        help_format="markdown",
        version=mhcplan.__version__,
        suppress_keyboard_interrupt=False,
        default_parameter=Parameter(show_default=_default, converter=value_of),
    )
    groups = {name: Group(name, sort_key=i) for i, name in enumerate(_GROUPS)}
    places: dict[str, dict[str, Any]] = {
        name: {"group": groups[group], "sort_key": i}
        for group, names in _GROUPS.items()
        for i, name in enumerate(names)
    }
    profile = App(
        name="profile", help="Measured times: list, show, check and compare them.",
        **places["profile"],
    )  # fmt: skip
    for parent, commands in ((app, _COMMANDS), (profile, _PROFILE_COMMANDS)):
        for name, (home, text) in commands.items():
            place = places[name] if parent is app else {}
            parent.command(home, name=name, help=text, help_epilogue=_examples(name), **place)
    # the capture parses its own options, so that it also runs without the command line's packages
    profile.command(
        "mhcplan.planner.cli.profile:measure",
        name="measure",
        help="Measure this machine's GPUs (needs torch and triton).",
        help_flags=[],
        version_flags=[],
    )
    app.command(profile)
    app.register_install_completion_command(  # pyright: ignore[reportUnknownMemberType]
        help="Complete commands and options in your shell."
    )
    options = Group("Options", sort_key=len(_GROUPS))
    for name in ("--help", "--version", "--install-completion"):
        app[name].group = options
    return app


def _default(value: object) -> str | None:
    """A default as help shows it: not where it says nothing."""
    return None if value in (None, False, []) else str(value)


def _examples(command: str) -> str | None:
    """The end of a command's help: lines to type."""
    lines = EXAMPLES.get(command)
    return "\n".join(["Examples:", "", *(f"    {line}" for line in lines)]) if lines else None


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code: 0 done, 1 nothing feasible, 2 bad input."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # imports and plans make many small objects and no cycles: looking for those took a tenth of
    # the first answer's time, and a last look at what the process leaves behind as much again
    gc.set_threshold(200_000, 20, 20)
    atexit.register(gc.freeze)
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("mhcplan: interrupted", file=sys.stderr)
        code = INTERRUPTED
    except BrokenPipeError:
        _say_no_more()  # whoever read us stopped reading
        code = BROKEN_PIPE
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _say_no_more()
        code = _refuse(f"cannot write: {error.strerror}")
    sys.exit(code)


def _say_no_more() -> None:
    """Standard output takes nothing any more, also not at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(arguments: list[str]) -> int:
    if arguments == ["--version"]:  # asked by scripts: not worth loading the command tree
        print(mhcplan.__version__)
        return 0
    from cyclopts import CycloptsError, UnknownOptionError, UnusedCliTokensError

    from mhcplan.planner.diagnose.recording import RecordingError
    from mhcplan.planner.output import OutputError
    from mhcplan.planner.plan.spec import SpecError
    from mhcplan.profiles.schema import ProfileError
    from mhcplan.sim.jit import NumbaError

    try:
        result: object = build_app()(
            arguments,
            exit_on_error=False,
            print_error=False,
            result_action="return_value",
        )
    except UnknownOptionError as error:
        return _refuse(_unknown_option(error))
    except UnusedCliTokensError as error:
        return _refuse(f"too many words: {' '.join(error.unused_tokens or ())}")
    except (
        CycloptsError, SpecError, ProfileError, OutputError, RecordingError, NumbaError,
    ) as error:  # fmt: skip
        return _refuse(str(error))
    except ImportError as error:
        missing = _missing_module(error)
        if missing not in _EXTRAS:
            raise
        return _refuse(f"{missing} is not installed: pip install 'mhcplan[{_EXTRAS[missing]}]'")
    return result if isinstance(result, int) else 0


def _unknown_option(error: UnknownOptionError) -> str:
    """A layout that plans cannot have, a field that has no flag, or a slip of the fingers."""
    from mhcplan.planner.plan.errors import fields_named, not_modelled
    from mhcplan.planner.plan.spec import PlanSpec

    option = (error.token.keyword or error.token.value).partition("=")[0]
    name = option.lstrip("-").replace("-", "_")
    if missing := not_modelled(name):
        return f"{option}: {missing}"
    takes_fields = any("--set" in argument.names for argument in error.argument_collection)
    if takes_fields and (paths := fields_named(name, PlanSpec)):
        return f"{option} is no flag; give " + " or ".join(f"--set {p}=VALUE" for p in paths)
    return str(error)


def _refuse(message: str) -> int:
    print(f"mhcplan: {' '.join(message.split())}", file=sys.stderr)
    return BAD_INPUT


def _missing_module(error: BaseException | None) -> str:
    """Top-level name of the module whose absence started a chain of import errors."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and error.name:
            return error.name.partition(".")[0]
        error = error.__cause__
    return ""
