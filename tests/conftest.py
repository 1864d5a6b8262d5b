"""Settings of all tests."""

from __future__ import annotations

from hypothesis import settings

# No test asserts a time: machines are shared, and the first call of a compiled function is slow.
settings.register_profile("mhcplan", deadline=None)
settings.load_profile("mhcplan")
