# SPDX-License-Identifier: Apache-2.0
import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from random import Random
from types import SimpleNamespace
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:  # other processes of pytest have the other cores
    # As many threads as cores in each process would wait for each other all the time. Engines and servers inherit this. Before
    # torch is imported: OpenMP reads it once, and torch.set_num_threads changes it for one thread only. Numba, which vLLM uses
    # for n-gram drafts, sets it to its own number, for good.
    os.environ |= {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}

import pytest
import torch
from server import Server, serve

from sage_backend.demo import MODEL_DIR
from sage_backend.demo.passkey import make_passkey

if not torch.cuda.is_available():
    # Triton reads this when a kernel is defined and when it runs. Engines are started without it.
    os.environ["TRITON_INTERPRET"] = "1"
    import interpreter  # Triton's functions are defined now, not while an engine runs

    interpreter.shorten()

if "VLLM_CACHE_ROOT" not in os.environ:
    # Calibrations of the tests' engines go to a folder of their own. With pytest -n, all processes inherit the first one's.
    os.environ["VLLM_CACHE_ROOT"] = tempfile.mkdtemp(prefix="sage-cache-")
    atexit.register(shutil.rmtree, os.environ["VLLM_CACHE_ROOT"], ignore_errors=True)

WITH_SERVER = (
    "deploy/test_server_load.py", "deploy/test_serving.py",
    "observability/test_canary.py", "observability/test_metrics.py", "observability/test_monitoring.py",
)  # fmt: skip
"""The files whose tests use the fixture `server`: one process runs them all."""
LONGEST = (
    "engine/test_engine.py", "variator/test_served.py", "variator/test_variator.py", "kernels/test_recall.py",
    "deploy/test_ray.py", "server", "tools/test_examples.py", "tools/test_quality.py", "kernels/test_store.py",
    "kernels/test_prefill.py",
)  # fmt: skip
"""What takes longest comes first, so that all processes end at about the same time."""


def _group(nodeid: str) -> str:
    """The file of a test, from the folder tests/ on, or "server"."""
    file = nodeid.partition("::")[0].removeprefix("tests/")
    return "server" if file in WITH_SERVER else file


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest files first, and the test that stops the shared server after all others that use it."""

    def order(item: pytest.Item) -> tuple[int, bool]:
        group = _group(item.nodeid)
        rank = LONGEST.index(group) if group in LONGEST else len(LONGEST)
        return rank, item.get_closest_marker("stops_server") is not None

    items.sort(key=order)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With several processes (`-n 2`, as in `make test`), each takes one file after another. The many small tests of
    kernels are taken one by one, to fill what is left."""
    from xdist.scheduler import LoadScopeScheduling

    config.option.loadscopereorder = False  # it would take the files with the most tests first

    class Scheduling(LoadScopeScheduling):  # its own groups (--dist loadgroup) are lost with pytest 9.2
        def _split_scope(self, nodeid: str) -> str:
            group = _group(nodeid)
            return nodeid if group.startswith("kernels/") and group != "kernels/test_compile.py" else group

    return Scheduling(config, log)


@pytest.fixture(scope="session")
def kernels() -> SimpleNamespace:
    """The kernels under test and the device they run on.

    On a GPU these are the functions of `sage_kernels.api`, which choose the implementation: portable or Hopper kernels. Without
    one they are the portable Triton kernels, in Triton's interpreter on the CPU. `decode` takes one argument more than
    `attend_decode`: programs, how many share the work (None: as many as the device takes).
    """
    from sage_kernels import api
    from sage_kernels.portable import decode, page_cache, prefill, recall, store

    if not torch.cuda.is_available():
        return SimpleNamespace(
            store=store.store,
            prefill=prefill.prefill,
            decode=decode.decode,
            store_summaries=recall.store_summaries,
            select_pages=recall.select_pages,
            fetch_pages=page_cache.fetch_pages,
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
        fetch_pages=api.fetch_pages,
        device="cuda",
    )


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests that need one. The test marked `stops_server` runs last, because the server is gone then."""
    with serve(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(scope="session")
def passkeys() -> list[tuple[str, str]]:
    """Prompts of up to 1500 tokens of the embedded model, with their answers."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    rng = Random(0)
    return [make_passkey(length, depth, rng, tokenizer) for length, depth in ((1500, 0.1), (1500, 0.6), (700, 0.5), (200, 0.9))]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For timings: with more threads, they would include waiting for cores that other processes use, such as the server."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
