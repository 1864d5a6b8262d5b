"""Without a GPU, Triton kernels run in the interpreter; it is chosen when they are imported."""

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def sound_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """An error that a kernel leaves on the device fails its own test and no other.

    It stays for the life of the process: the tests that follow cannot run, and say so.
    """
    if request.node.get_closest_marker("gpu") is None:
        yield
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        pytest.skip("an earlier test broke the CUDA context")
    yield
    torch.cuda.synchronize()
