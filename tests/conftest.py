# SPDX-License-Identifier: Apache-2.0
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from interpreter import patch_language_once
from server import Server, serve

if not torch.cuda.is_available():
    # Triton reads this when a kernel is defined and when it runs. Engines are started without it.
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language  # noqa: F401  # its functions are defined now, not while an engine runs

    patch_language_once()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the test that stops the shared server after all others, whatever the names of the files are."""
    items.sort(key=lambda item: item.get_closest_marker("stops_server") is not None)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With two processes (`-n 2`, as in `make test`), one runs all tests that start engines and servers, in the usual order.
    The other runs the kernel tests, which only compute. Whichever finishes first helps with the kernel tests that are left."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):  # its own groups (--dist loadgroup) are lost with pytest 9.2
        def _split_scope(self, nodeid: str) -> str:
            if not nodeid.startswith("tests/kernels/"):
                return "engines"
            return "compile" if "/test_compile.py" in nodeid else nodeid

    return Scheduling(config, log)


@pytest.fixture(scope="session")
def kernels() -> SimpleNamespace:
    """The kernels under test and the device they run on.

    On a GPU these are the functions of `sage_kernels.api`, which choose the implementation: portable or Hopper kernels. Without
    one they are the portable Triton kernels, in Triton's interpreter on the CPU. `decode` takes one argument more than
    `attend_decode`: programs, how many share the work (None: as many as the device takes).
    """
    from sage_kernels import api
    from sage_kernels.portable import decode, prefill, recall, store

    if not torch.cuda.is_available():
        return SimpleNamespace(
            store=store.store,
            prefill=prefill.prefill,
            decode=decode.decode,
            store_summaries=recall.store_summaries,
            select_pages=recall.select_pages,
            device="cpu",
        )

    def decode_by_programs(query, pages, layout, batch, scale, out, modifiers=None, workspace=None, *, programs=None):
        if programs is None:
            return api.attend_decode(query, pages, layout, batch, scale, out, modifiers, workspace)
        module, choice = decode, api.choose_kernels(query.device, layout, query.shape[1] // pages.shape[1])
        if choice.decode == "hopper" and batch.rope_shift is None:
            from sage_kernels.hopper import decode as module
        return module.decode(query, pages, layout, batch, scale, out, modifiers, workspace, programs=programs)

    return SimpleNamespace(
        store=api.store,
        prefill=api.attend_prefill,
        decode=decode_by_programs,
        store_summaries=api.store_summaries,
        select_pages=api.select_pages,
        device="cuda",
    )


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests that need one. The test marked `stops_server` runs last, because the server is gone then."""
    with serve(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For timings: with more threads, they would include waiting for cores that other processes use, such as the server."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
