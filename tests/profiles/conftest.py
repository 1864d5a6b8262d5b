"""The synthetic profile and its cost model, made once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mhcplan.profiles.lookup import CostModel
from tests.support.synthetic_profile import synthetic_profile

if TYPE_CHECKING:
    from mhcplan.profiles.schema import Profile


@pytest.fixture(scope="session")
def profile() -> Profile:
    """See :mod:`tests.support.synthetic_profile`."""
    return synthetic_profile()


@pytest.fixture(scope="session")
def costs(profile: Profile) -> CostModel:
    """Prices by the synthetic profile."""
    return CostModel(profile)
