"""From a plan to its prediction, and all that is said of it. A room for each step of the way:

plan, schedules, lowering (to a Program), report, figures; many plans: sweep, search; about a step:
compare, explain, export, check; about runs: measured, diagnose; and cli, the commands. ``predict``
goes the way once, ``api`` is what ``import mhcplan`` has. ARCHITECTURE.md has the map.
"""
