# SPDX-License-Identifier: Apache-2.0
import os
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from server import Server, serve

if not torch.cuda.is_available():
    # Triton reads this when a kernel is defined and when it runs. Engines are started without it.
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language  # noqa: F401  # whose functions are defined now, and not while an engine runs


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the test that stops the shared server after all others, whatever the names of the files are."""
    items.sort(key=lambda item: item.get_closest_marker("stops_server") is not None)


@pytest.fixture(scope="session")
def kernels() -> SimpleNamespace:
    """The Triton kernels and the device they run on: the GPU, or Triton's interpreter on the CPU."""
    from sage_kernels import decode, prefill, recall, store

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return SimpleNamespace(
        store=store.store,
        prefill=prefill.prefill,
        decode=decode.decode,
        store_summaries=recall.store_summaries,
        recall=recall.recall,
        device=device,
    )


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests that need one. The test marked `stops_server` runs last, because the server is gone then."""
    with serve(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For timings: more threads would wait for cores that others use, such as the server, and not for the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
