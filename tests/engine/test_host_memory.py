# SPDX-License-Identifier: Apache-2.0
"""The host memory that pages take, and what they do not go with."""

import functools
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from engines import NGRAM_DRAFTS, environment, save_random_model

from sage_backend import plugin
from sage_backend.demo import MODEL_DIR
from sage_backend.engine import checks, host_pages
from sage_backend.engine.patches import host_pages as patch
from sage_backend.options import SageOptions


def test_the_memory_is_there_until_its_finalizers_have_run() -> None:
    """CUDA, which has pinned it, would look for it. Another thread may have taken the addresses of memory that is gone."""
    lines: list[str] = []
    memory = host_pages._mapped(1 << 20)
    host = torch.frombuffer(memory, dtype=torch.int8)
    first, last = (host.data_ptr() + offset for offset in (0, host.numel() - 1))
    weakref.finalize(memory, lambda: lines.extend(Path("/proc/self/maps").read_text().splitlines()))

    def mapped(lines: list[str]) -> bool:
        ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
        return all(any(low <= address < high for low, high in ranges) for address in (first, last))

    del memory
    assert not lines, "the tensor has it"
    del host
    assert mapped(lines)


def test_more_memory_than_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_pages, "free_host_memory", lambda: 1 << 30)
    with pytest.raises(RuntimeError, match=r"^2\.0 GiB of host memory are asked for, and 1\.0 are free; lower "):
        host_pages._pinned(2 << 30, torch.device("cpu"))


def test_both_model_runners_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second engine of a process may take the other one, whose module is imported only then."""
    modules = {name: SimpleNamespace(allocate_kv_cache=lambda *_: "on the GPU") for name in patch._RUNNERS}
    monkeypatch.setattr(patch, "_replace_in", functools.cache(patch._replace_in.__wrapped__))
    monkeypatch.setattr(patch, "find", lambda name, module: modules[module])
    monkeypatch.setattr(host_pages, "allocate", lambda allocate, *_: "in host memory")
    for known in (1, 2, 2):
        imported = {name: modules[name] for name in patch._RUNNERS[:known]}
        monkeypatch.setattr(patch, "sys", SimpleNamespace(modules=imported))
        patch._replace_allocation()
        found = [module.allocate_kv_cache(None) for module in modules.values()]
        assert found == ["in host memory"] * known + ["on the GPU"] * (2 - known)


@pytest.mark.parametrize("value", [0, -1, "x", True, None])
def test_wrong_values(value: Any) -> None:
    with pytest.raises(ValueError, match=r'^"host_gib" in option "memory" .* must be a number of GiB above 0$'):
        SageOptions.parse({"sage": {"memory": {"host_gib": value}}})


def test_layers_that_read_everything() -> None:
    with pytest.raises(ValueError, match=r'^"host_gib" in option .* does not go with "dense_layers", .*; leave one out$'):
        SageOptions.parse({"sage": {"memory": {"host_gib": 1, "dense_layers": [0]}}})


def refusal(host_gib: float = 0.1, model: Path = MODEL_DIR, **arguments: Any) -> str:
    """The message that an engine with host pages would end with; empty if it would start."""
    memory = {"local_tokens": 128, "topk_pages": 1, "query_block": 128, "host_gib": host_gib}
    with environment():
        from vllm.engine.arg_utils import EngineArgs

        plugin.register()
        options: dict[str, Any] = {"additional_config": {"sage": {"memory": memory}}, "skip_tokenizer_init": True, **arguments}
        try:
            EngineArgs(model=str(model), attention_backend="SAGE", **options).create_engine_config()
        except ValueError as error:
            return str(error)
    return ""


REFUSED: Mapping[str, tuple[dict[str, Any], str]] = {
    "connector": (
        {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
        "a KV connector would move pages that are in host memory; leave it out",
    ),
    "sleep mode": ({"enable_sleep_mode": True}, "--enable-sleep-mode would lose what the GPU knows of them; leave it out"),
    "drafter": (
        {"speculative_config": {"method": "draft_model", "model": str(MODEL_DIR), "num_speculative_tokens": 3}},
        "a drafter's pages cannot be in host memory; leave --speculative-config out, or choose ngram",
    ),
    "host memory": ({"host_gib": 2.5}, "2.5 GiB are asked for, and 2.0 are free in the host's memory; lower it"),
    "of several API servers": (
        {"host_gib": 2.5, "_api_process_count": 2, "_api_process_rank": -1},
        "2.5 GiB are asked for, and 2.0 are free in the host's memory; lower it",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line, before anything is loaded."""
    monkeypatch.setattr(checks, "free_host_memory", lambda: 2 << 30)
    with environment():
        from vllm.platforms import current_platform
    monkeypatch.setattr(current_platform, "is_sleep_mode_available", lambda: True, raising=False)
    arguments, message = REFUSED[case]
    assert refusal(**arguments) == (
        f'option "host_gib" in option "memory" in --additional-config "sage" cannot be served: {message}'
    )


def test_engines_that_join_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM makes their configuration only where there are GPUs."""
    check = checks._check_host_pages

    def joining(config: Any, host_gib: float) -> None:
        monkeypatch.setattr(config.parallel_config, "enable_elastic_ep", True)
        check(config, host_gib)

    monkeypatch.setattr(checks, "_check_host_pages", joining)
    assert refusal().endswith("would not know that its pages are in host memory; leave --enable-elastic-ep out")


def test_what_goes_with_host_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts without a model, and all of what is free."""
    monkeypatch.setattr(checks, "free_host_memory", lambda: 2 << 30)
    assert refusal(2, speculative_config=NGRAM_DRAFTS) == ""
    assert refusal(3, _api_process_count=2, _api_process_rank=1) == "", "what is free now has been allocated for it"
    two_hosts = {"nnodes": 2, "pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}
    assert refusal(4, **two_hosts) == "", "each has half of it"
    assert "2.05 GiB are asked for" in refusal(4.1, **two_hosts)


BASE: dict[str, Any] = {
    "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64,
    "vocab_size": 512, "intermediate_size": 64, "max_position_embeddings": 1024,
}  # fmt: skip
MODELS = {
    "all layers": transformers.MistralConfig(**BASE, sliding_window=100),
    "some layers": transformers.Gemma2Config(**BASE, sliding_window=100, layer_types=["sliding_attention", "full_attention"]),
}


@pytest.mark.parametrize("layers", MODELS)
def test_sliding_windows(layers: str, tmp_path: Path) -> None:
    save_random_model(tmp_path, MODELS[layers])
    assert refusal(model=tmp_path).endswith(
        "cannot be served: the model has layers that do not attend to whole contexts, whose pages cannot be in host memory"
    )


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("limit", "free"), [(None, 5000), ("max", 5000), ("9000", 5000), ("4000", 1300)],
    ids=["no container", "no limit", "more than is available", "less than is available"],
)  # fmt: skip
def test_free_host_memory(version: int, limit: str | None, free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """5000 bytes are available, and a container has used 3000 of those that it may have, 300 of them for files."""
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=5000))
    monkeypatch.setattr(checks, "CGROUP", tmp_path)
    files = {"memory.current": "3000", "memory.stat": "anon 2600\nactive_file 100\ninactive_file 200", "memory.max": limit}
    if version == 1:  # whose own processes are counted apart from those of groups within
        files = {
            "memory/memory.usage_in_bytes": "3000",
            "memory/memory.stat": "active_file 1\ninactive_file 2\ntotal_active_file 100\ntotal_inactive_file 200",
            "memory/memory.limit_in_bytes": "9223372036854771712" if limit == "max" else limit,
        }
    for name, text in files.items() if limit else ():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    assert checks.free_host_memory() == free
