"""``mhcplan profile``: list, show, check and compare the times that predictions are made of."""

from __future__ import annotations

from collections import Counter
from importlib import import_module
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from mhcplan.profiles import store
from mhcplan.profiles.derive import DERIVED

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import Console

    from mhcplan.profiles.holdout import HeldOut
    from mhcplan.profiles.schema import Profile

NameOrFile = Annotated[str, Parameter(help="a shipped profile's name, or a profile file (.json)")]
Json = Annotated[bool, Parameter(negative=(), help="print JSON instead of text")]


def list_(*, json: Json = False) -> None:
    """List the profiles that come with mhcplan: what each measured, or is scaled from, and when."""
    profiles = store.list_profiles()
    if json:
        from json import dumps

        print(dumps([_summary(profile) for profile in profiles], indent=2))
        return
    console = _console()
    _table(
        console,
        "",
        list(_summary(profiles[0])) if profiles else ["no profile is shipped"],
        ([str(v) for v in _summary(profile).values()] for profile in profiles),
    )


def show(profile: NameOrFile, /, *, json: Json = False) -> None:
    """Show a profile: the machine, the software, the rates, and how many times of each kind.

    With --json: the very file that ``--profile`` reads.

    Args:
        profile: a shipped profile's name, or a profile file (.json)
        json: print the profile file
    """
    found = store.find_profile(profile)
    if json:
        print(store.profile_file_text(profile), end="")
        return
    console = _console()
    _table(console, found.name, ("", ""), _about(found))
    rates = (
        (r.name, f"{r.per_second:,}", f"{r.spread_percent:.1f}", r.source) for r in found.rates
    )
    _table(console, "Rates", ("rate", "per second", "spread %", "source"), rates)
    _table(
        console,
        "Ops",
        ("kind", "rows", "passes", "fastest us", "slowest us", "spread %"),
        _op_rows(found),
    )
    _table(
        console,
        "Transfers",
        ("pattern", "medium", "ranks", "rows", "bytes", "GB/s at most"),
        _transfer_rows(found),
    )


def validate(
    profile: NameOrFile,
    /,
    *,
    holdout: Annotated[bool, Parameter(negative=())] = False,
    json: Json = False,
) -> int:
    """Check a profile; prints every problem, one a line, and exits 2 if there is one.

    Args:
        profile: the profile file, or a shipped profile's name
        holdout: also leave out a fifth of what was measured and say how well the rest predicts it,
            and whether that is within the bars
        json: print JSON instead of text
    """
    problems = store.validate(profile)
    left_out = _held_out(profile) if holdout and not problems else []
    if json:
        from json import dumps

        families = [
            row._asdict() | {"bar": row.bar._asdict(), "misses": row.misses} for row in left_out
        ]
        print(dumps({"problems": problems, "holdout": families}, indent=2))
        return 2 if problems else 0
    for problem in problems:
        print(problem)
    if problems:
        return 2
    print(f"{profile}: no problem")
    if left_out:
        _print_holdout(left_out)
    return 0


def diff(first: NameOrFile, second: NameOrFile, /, *, json: Json = False) -> None:
    """Compare two profiles figure by figure: what is new, gone, faster and slower.

    Args:
        first: a shipped profile's name, or a profile file
        second: the one to compare with it
        json: print JSON instead of text
    """
    result = store.diff(store.find_profile(first), store.find_profile(second))
    if json:
        from dataclasses import asdict
        from json import dumps

        print(dumps(asdict(result), indent=2))
        return
    console = _console()
    changed = sorted(result.changed, key=lambda change: -abs(change.percent))
    rows = (
        (c.row, f"{c.before:,}", f"{c.after:,}", f"{c.percent:+.1f}",
         "" if c.beyond_spread else "within spread")
        for c in changed
    )  # fmt: skip
    if changed:
        title = "Changed: times in ns, rates a second, overheads as they are named"
        _table(console, title, ("figure", "first", "second", "%", ""), rows)
    for name, only in (("first", result.removed), ("second", result.added)):
        for row in only:
            console.print(f"only in the {name}: {row}", soft_wrap=True)
    if result.other:
        console.print(f"differ as well: {', '.join(result.other)}", soft_wrap=True)
    console.print(
        f"{len(changed)} figures changed, {result.unchanged} equal, {len(result.added)} new,"
        f" {len(result.removed)} gone"
    )


def measure(
    *words: Annotated[str, Parameter(name="OPTIONS", allow_leading_hyphen=True)],
) -> int:
    """Measure this machine's GPUs: ops, transfers, rates and overheads; needs torch and triton.

    With ``--from-trace`` it makes a profile
    of a trace of your own run instead, which needs neither.

    Args:
        words: see --help
    """
    if "--from-trace" in words:
        return import_module("mhcplan.planner.measured.trace_profile").main(list(words))
    capture = import_module("mhcplan.profiles.capture.__main__")
    code: int = capture.main(list(words), "mhcplan profile measure")
    return code


def _held_out(profile: str) -> list[HeldOut]:
    from mhcplan.planner.cli.terminal import progress
    from mhcplan.profiles.holdout import holdout

    with progress("predicting what was left out, and playing overlapped pairs"):
        return holdout(store.find_profile(profile), store.contention_log(profile))


def _print_holdout(rows: list[HeldOut]) -> None:
    cells = (
        (row.family, f"{row.held_out} of {row.shapes}", f"{row.median_percent:.1f}",
         f"{row.p90_percent:.1f}", f"{row.mean_percent:.1f}", f"{row.worst_percent:+.1f}",
         row.worst, "FAIL: " + "; ".join(row.misses) if row.misses else "pass")
        for row in rows
    )  # fmt: skip
    columns = (
        "family", "held out", "median %", "90th %", "mean %", "worst %", "worst at", "bar"
    )  # fmt: skip
    console = _console()
    title = "Error of what was left out, predicted from the rest"
    _table(console, title, columns, cells)
    missed = sum(bool(row.misses) for row in rows)
    console.print(f"{len(rows) - missed} of {len(rows)} families pass")


def _summary(profile: Profile) -> dict[str, str | int]:
    run = profile.provenance[0] if profile.provenance else None
    device = run.device if run else ""
    return {
        "name": profile.name,
        "device": f"{DERIVED[profile.name]}, scaled" if profile.name in DERIVED else device,
        "measured_on": run.measured_on if run else "",
        "ops": len(profile.ops),
        "transfers": len(profile.transfers),
        "digest": profile.digest[:12],
    }


def _about(profile: Profile) -> Iterable[tuple[str, str]]:
    yield "digest", profile.digest
    yield "hardware", f"{profile.hardware.name}: {profile.hardware.source}"
    link = profile.hardware.inter_node
    yield "network (assumed)", f"{link.bytes_per_second:,} bytes/s: {link.source}"
    rows = {
        name: Counter(row.run for row in of_kind)
        for name, of_kind in (("ops", profile.ops), ("transfers", profile.transfers))
    }
    for i, run in enumerate(profile.provenance):
        left = "".join(f", {count[i]:,} {name}" for name, count in rows.items() if count[i])
        yield "measured", f"{run.measured_on} on {run.num_devices} x {run.device}{left}"
        yield "", f"driver {run.driver}, SM clock {run.sm_clock_mhz} MHz, {run.power_watts:.0f} W"
        yield "", ", ".join(f"{name} {version}" for name, version in run.versions.items())
        yield "", ", ".join(f"{name}={value}" for name, value in run.environment.items())
        yield "", run.command


def _op_rows(profile: Profile) -> Iterable[tuple[str, ...]]:
    for kind in dict.fromkeys(row.kind for row in profile.ops):
        rows = [row for row in profile.ops if row.kind == kind]
        times = [row.duration_ns for row in rows]
        spread = max(row.spread_percent for row in rows)
        passes = "".join(sorted({row.pass_ for row in rows}))
        yield (kind, str(len(rows)), passes, f"{min(times) / 1e3:,.1f}", f"{max(times) / 1e3:,.1f}",
               f"{spread:.1f}")  # fmt: skip


def _transfer_rows(profile: Profile) -> Iterable[tuple[str, ...]]:
    counts = Counter((row.pattern, row.medium, row.group_size) for row in profile.transfers)
    for (pattern, medium, size), count in counts.items():
        rows = [
            row for row in profile.transfers
            if (row.pattern, row.medium, row.group_size) == (pattern, medium, size)
        ]  # fmt: skip
        sizes = [row.bytes for row in rows]
        best = max(row.bytes / row.duration_ns for row in rows)
        yield (pattern, medium, str(size), str(count), f"{min(sizes):,} .. {max(sizes):,}",
               f"{best:,.1f}")  # fmt: skip


def _console() -> Console:
    from mhcplan.planner.cli.terminal import output

    return output()


def _table(
    console: Console, title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]
) -> None:
    from mhcplan.planner.report.table import Section, print_section

    print_section(Section(title, tuple(columns), tuple(map(tuple, rows))), console)
