"""Without a GPU, Triton kernels run in the interpreter; it is chosen when they are imported."""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch

from tests.support.compile_ahead import compile_ahead

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def _compiled_ahead(request: pytest.FixtureRequest) -> None:
    """Kernels of all GPU tests that will run."""
    modules = {
        item.module: None for item in request.session.items if isinstance(item, pytest.Function)
    }
    compile_ahead(job for module in modules for job in getattr(module, "COMPILE_AHEAD", ()))


@pytest.fixture(autouse=True)
def sound_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """An error that a kernel leaves on the device fails its own test and no other.

    It stays for the life of the process: the tests that follow cannot run, and say so.
    """
    if request.node.get_closest_marker("gpu") is None:
        yield
        return
    request.getfixturevalue("_compiled_ahead")
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        pytest.skip("an earlier test broke the CUDA context")
    yield
    torch.cuda.synchronize()


@pytest.fixture
def no_waits() -> Callable[[], AbstractContextManager[None]]:
    """``with no_waits():`` what makes the host wait for the GPU raises."""

    @contextmanager
    def entered() -> Iterator[None]:
        with warnings.catch_warnings():
            # torch says once, on its first use, that the mode misses some waits
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return entered
