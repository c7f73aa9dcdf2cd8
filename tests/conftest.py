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
    """One server for all tests that need one, which test_serving.py stops: other files that use it have names before that."""
    with serve(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For what is timed: more would wait for cores that others are on, such as the server, and not for the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
