# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters beside compression plugins: rows of groups are computed with the adapter of their request."""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from engines import (
    EXACT,
    NOISE,
    Answer,
    assert_same_answers,
    changes,
    engine,
    environment,
    give_two_workers_cores,
    greedy,
    heldout_prompts,
)
from loud_plugins import loud_plugins
from safetensors.torch import load_file, save_file

from sage_backend.demo import MODEL_DIR
from sage_backend.options import MIN_TAIL
from sage_backend.variator.admission import RATIO, TAIL
from sage_backend.variator.groups import PLAIN, START, CompressionPlan, Segment, segments
from sage_backend.variator.plugin import CompressionPlugin

OPTIONS = {"smooth_k": False, "equalize": False}
LORA = {"enable_lora": True, "max_loras": 3, "max_lora_rank": 8}
"""One slot more than there are adapters: before 0.33, vLLM on a CPU computes requests without an adapter with the last slot's
if others of the batch have one (the index -1 in vllm/lora/ops/torch_ops/lora_ops.py)."""
LENGTHS = (700, 300, 145, 400, 520, 333)
FFN = "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"
ADAPTERS = {"wide": (8, (*FFN, "self_attn.o_proj")), "narrow": (4, FFN)}
"""The rank of each adapter and what it changes in a layer. FFNs of layers with plugins are among it."""

MERGED = max(NOISE, 0.1)
"""Bound on the change of a token's log-probability from an adapter to the weights that it is merged into, in nats. Its products
round differently, and so do 8-bit keys after them: without plugins, changes of up to 0.04 were seen, and 1e-5 with vLLM's own
backend; with plugins, 0.05. Where FFNs compute groups without their adapter, changes are up to 1.3."""


def low_rank(name: str, shape: torch.Size, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A [rank, in] and B [out, rank] of an adapter for a weight [out, in]: large enough to change answers clearly."""
    rank, (outputs, inputs) = ADAPTERS[name][0], shape
    a = torch.randn(rank, inputs, generator=generator) / inputs**0.5
    return a, torch.randn(outputs, rank, generator=generator) / rank**0.5 * 0.3


def save_adapter(folder: Path, name: str) -> None:
    """An adapter for the embedded model as PEFT saves it, in `folder/name`; and in `folder/name-merged`, plugins and, as
    `model`, the model with the adapter merged."""
    rank, modules = ADAPTERS[name]
    weights = {key: weight.float() for key, weight in load_file(MODEL_DIR / "model.safetensors").items()}
    generator, matrices = torch.Generator().manual_seed(rank), {}
    for key in [key for key in weights if key.endswith(tuple(f"{module}.weight" for module in modules))]:
        a, b = low_rank(name, weights[key].shape, generator)
        weights[key] += 2 * b @ a
        prefix = f"base_model.model.{key.removesuffix('.weight')}"
        matrices |= {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
    adapter, merged = folder / name, folder / f"{name}-merged" / "model"
    adapter.mkdir()
    save_file(matrices, adapter / "adapter_model.safetensors")
    described = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": [m.split(".")[1] for m in modules]}
    (adapter / "adapter_config.json").write_text(json.dumps(described))
    shutil.copytree(MODEL_DIR, merged)
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})
    loud_plugins(merged.parent, merged)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the adapters, models that have them merged, and plugins."""
    path = tmp_path_factory.mktemp("lora")
    for name in ADAPTERS:
        save_adapter(path, name)
    loud_plugins(path)
    return path


def asked_of(ratio: int) -> dict[str, int]:
    return {RATIO: ratio, TAIL: MIN_TAIL}


def ask(
    llm: Any, folder: Path, prompts: Sequence[list[int]], adapters: Sequence[str | None], ratios: Sequence[int], **how: Any
) -> list[Answer]:
    """Continue the prompts with the adapters and ratios of each."""
    from vllm.lora.request import LoRARequest

    names = list(ADAPTERS)
    requests = [name and LoRARequest(name, names.index(name) + 1, str(folder / name)) for name in adapters]
    return greedy(llm, prompts, 16, extra_args=[asked_of(ratio) for ratio in ratios], adapters=requests, **how)


def compressing(folder: Path, **arguments: Any) -> Any:
    """An engine with the plugins in a folder."""
    options = {**OPTIONS, "variator": {"plugins": str(folder / "plugins.safetensors")}}
    return engine(dtype=EXACT, additional_config={"sage": options}, **arguments)


def assert_different(a: Answer, b: Answer) -> None:
    """Either other tokens, or clearly other log-probabilities."""
    assert a.tokens != b.tokens or max(changes(a, b)) > 2 * MERGED


def assert_as_merged(
    answers: Sequence[Answer], merged: dict[tuple[str, int], list[Answer]], adapters: Sequence[Any], ratios: Sequence[int]
) -> None:
    """Assert that compressed requests of a batch got what models answer that have their adapters merged."""
    compared = [i for i, ratio in enumerate(ratios) if adapters[i] and ratio > 1]
    assert len(compared) == 4
    assert_same_answers([answers[i] for i in compared], [merged[adapters[i], ratios[i]][i] for i in compared], MERGED)


MIXED = [("wide", 2), ("narrow", 4), (None, 2), ("wide", 1), ("narrow", 2), ("wide", 4)]
"""Adapters and ratios of the requests of a batch."""


@pytest.fixture(scope="module")
def plain(folder: Path) -> tuple[list[list[int]], dict[str | None, list[Answer]]]:
    """Prompts, and the answers with each adapter of an engine without plugins."""
    with engine(dtype=EXACT, additional_config={"sage": OPTIONS}, **LORA) as llm:
        prompts = heldout_prompts(llm, LENGTHS)
        count = len(prompts)
        return prompts, {name: ask(llm, folder, prompts, [name] * count, [1] * count) for name in (None, *ADAPTERS)}


@pytest.fixture(scope="module")
def merged(folder: Path, plain: Any) -> dict[tuple[str, int], list[Answer]]:
    """The answers of models that have an adapter merged, by adapter and ratio, with the same plugins and without LoRA."""
    found = {}
    for name in ADAPTERS:
        own = folder / f"{name}-merged"
        with compressing(own, model=own / "model") as llm:
            for ratio in (2, 4):
                extra = [asked_of(ratio)] * len(LENGTHS)
                found[name, ratio] = greedy(llm, plain[0], 16, extra_args=extra)
    return found


@pytest.fixture(scope="module")
def served(folder: Path, plain: Any, merged: Any) -> Iterator[Any]:
    """This engine ends when a test starts another one, so the tests that use it come first."""
    with compressing(folder, enable_prefix_caching=True, max_num_batched_tokens=1024, max_num_seqs=8, **LORA) as llm:
        yield llm


@pytest.mark.engine
def test_without_compression(served: Any, folder: Path, plain: Any) -> None:
    """Requests with ratio 1 get what an engine without plugins answers, and adapters make a difference."""
    prompts, expected = plain
    for name in expected:
        assert_same_answers(ask(served, folder, prompts, [name] * len(prompts), [1] * len(prompts)), expected[name])
    for i in range(len(prompts)):
        for a, b in ((None, "wide"), (None, "narrow"), ("wide", "narrow")):
            assert_different(expected[a][i], expected[b][i])


@pytest.mark.engine
def test_merged_weights(served: Any, folder: Path, plain: Any, merged: dict[tuple[str, int], list[Answer]]) -> None:
    """Compressed prompts get what the model answers that has the adapter merged into its weights."""
    prompts, without = plain
    for (name, ratio), expected in merged.items():
        assert served.reset_prefix_cache()
        found = ask(served, folder, prompts, [name] * len(prompts), [ratio] * len(prompts))
        assert_same_answers(found, expected, MERGED)
        for a, b in zip(expected, without[name], strict=True):
            assert_different(a, b)


@pytest.mark.engine
def test_mixed_batch(served: Any, folder: Path, plain: Any, merged: dict[tuple[str, int], list[Answer]]) -> None:
    """Requests with several adapters and ratios, and without them, in one batch: each gets the same as alone."""
    prompts, _ = plain
    for shift in range(2):
        adapters, ratios = zip(*MIXED[shift:], *MIXED[:shift], strict=True)
        assert served.reset_prefix_cache()
        together = ask(served, folder, prompts, adapters, ratios)
        assert served.reset_prefix_cache()
        assert_same_answers(together, ask(served, folder, prompts, adapters, ratios, together=False))
        assert_as_merged(together, merged, adapters, ratios)


@pytest.mark.engine
def test_prefix_cache(served: Any, folder: Path, plain: Any) -> None:
    """Blocks are found again with their adapter and their ratio only."""
    assert served.reset_prefix_cache()
    prompts = plain[0][:1]
    kinds = [("wide", 2), ("narrow", 2), (None, 2), ("wide", 4), ("wide", 1)]
    first = [ask(served, folder, prompts, [name], [ratio])[0] for name, ratio in kinds]
    again = [ask(served, folder, prompts, [name], [ratio])[0] for name, ratio in kinds]
    assert [answer.cached for answer in first] == [0] * len(kinds)
    assert [answer.cached for answer in again] == [(LENGTHS[0] - 1) // 128 * 128] * len(kinds)
    assert_same_answers(again, first)


@pytest.mark.engine
@pytest.mark.skipif(not torch.cuda.is_available(), reason="vLLM compiles models with LoRA on GPUs only")
def test_compiled_model(folder: Path, plain: Any, merged: dict[tuple[str, int], list[Answer]]) -> None:
    """With torch.compile, which must not trace into the op, and with CUDA graphs, which decodes replay with their adapters."""
    adapters, ratios = zip(*MIXED, strict=True)
    with compressing(folder, enforce_eager=False, **LORA) as llm:
        assert_as_merged(ask(llm, folder, plain[0], adapters, ratios), merged, adapters, ratios)


@pytest.mark.engine
def test_tensor_parallel(
    folder: Path, plain: Any, merged: dict[tuple[str, int], list[Answer]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers in processes of their own, each with half of every FFN and of its adapters."""
    give_two_workers_cores(monkeypatch)
    adapters, ratios = zip(*MIXED, strict=True)
    with compressing(folder, tensor_parallel_size=2, **LORA) as llm:
        assert_as_merged(ask(llm, folder, plain[0], adapters, ratios), merged, adapters, ratios)


# Without an engine

SLOTS = [5, None, 9, None]
"""The ids of adapters in a worker's slots. The last one is empty, as in LORA."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random_batch(seed: int, adapters: Sequence[int]) -> tuple[list[Segment], list[int], list[int]]:
    """The segments of a batch, the adapter of each of its rows, and that of each row which FFNs compute, 0 for none."""
    random = Random(seed)
    requests: list[tuple[int, int, int, CompressionPlan]] = []
    of_step: list[int] = []
    of_groups: list[int] = []
    for _ in range(8):
        plan, adapter = CompressionPlan(random.choice((1, 2, 4)), 16 * random.randrange(8)), random.choice(adapters)
        position, first = 16 * random.randrange(3), len(of_step)
        end = position + random.randrange(1, 100)
        requests.append((first, first + end - position, position, plan if plan.ratio > 1 else PLAIN))
        of_step += [adapter] * (end - position)
        while position < end:
            whole = position >= START and position % plan.ratio == 0 and position + plan.ratio <= min(plan.limit, end)
            position += plan.ratio if whole else 1
            of_groups.append(adapter)
    return segments(requests), of_step, of_groups


def manager(of_step: Sequence[int]) -> Any:
    """What is read of vLLM's LoRAModelManager, in a step whose rows have these adapters."""
    from vllm.config.lora import LoRAConfig
    from vllm.lora.layers import LoRAMapping

    limits = {"max_num_batched_tokens": 1024, "max_num_seqs": 8, "vocab_size": 512, "lora_slots": len(SLOTS)}
    mapping, config = LoRAMapping(tuple(of_step), (0,), is_prefill=True), LoRAConfig(max_loras=len(SLOTS), max_lora_rank=8)
    return SimpleNamespace(**limits, device=DEVICE, lora_config=config, lora_index_to_id=list(SLOTS), _last_mapping=mapping)


@pytest.fixture
def lora(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module that is tested, which imports vLLM."""
    with environment():
        from vllm.lora.layers import BaseLayerWithLoRA
        from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta
        from vllm.lora.punica_wrapper import punica_gpu

        from sage_backend.variator import layers, lora

        # Without a GPU, vLLM does not import this there.
        monkeypatch.setattr(punica_gpu, "LoRAKernelMeta", LoRAKernelMeta, raising=False)
        yield SimpleNamespace(module=lora, layers=layers, Layer=BaseLayerWithLoRA, OnGpu=punica_gpu.PunicaWrapperGPU)


@pytest.mark.parametrize("seed", range(8))
def test_metadata_of_gpu_kernels(lora: Any, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What vLLM's Triton kernels get: each row's slot, and the rows sorted by slots."""
    monkeypatch.setattr(lora.module, "get_punica_wrapper", lora.OnGpu)
    cut, of_step, of_groups = random_batch(seed, [[0, 5, 9], [0]][seed == 7])
    layer = lora.Layer()
    layer.set_mapping("of the step")
    with lora.module.AdaptersOfGroups(manager(of_step)).of(layer)(cut):
        found = layer.punica_wrapper.token_mapping_meta.meta_args(len(of_groups), specialize_active_lora=True)
    assert layer.punica_wrapper == "of the step"
    of_rows, rows, counts, starts, slots, none, active = (each.tolist() for each in found)
    assert none == [not any(of_groups)]
    if none == [True]:
        return
    expected = [SLOTS.index(adapter) if adapter else -1 for adapter in of_groups]
    assert of_rows == expected
    assert active[0] >= len(set(expected))
    for i, slot in enumerate(sorted(set(expected))):
        assert slots[i] == slot
        assert sorted(rows[starts[i] : starts[i] + counts[i]]) == [row for row, each in enumerate(expected) if each == slot]


def adapted_linear(lora: Any, inputs: int, outputs: int, dtype: torch.dtype) -> Any:
    """A LoRA layer in one part, with random weights and the adapters of SLOTS, which change it as much as it computes."""

    class AdaptedLinear(lora.Layer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x @ self.weight.T
            self.punica_wrapper.add_lora_linear(y, x, (self.a,), (self.b,), 1.0, (outputs,))
            return y

        def of_adapter(self, adapter: int) -> torch.Tensor:
            """The weight with an adapter merged, in float32."""
            slot = SLOTS.index(adapter) if adapter else -1
            return self.weight.float() + self.b[slot, 0].float() @ self.a[slot, 0].float()

    layer = AdaptedLinear()
    layer.weight = torch.randn(outputs, inputs, dtype=dtype, device=DEVICE) / inputs**0.5
    layer.a = torch.randn(len(SLOTS), 1, 8, inputs, dtype=dtype, device=DEVICE) / inputs**0.5
    layer.b = torch.randn(len(SLOTS), 1, outputs, 8, dtype=dtype, device=DEVICE) / 8**0.5
    for slot, adapter in enumerate(SLOTS):
        layer.b[slot] *= adapter is not None
    return layer


@pytest.mark.parametrize("seed", range(4))
def test_a_ffn_with_adapters(lora: Any, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An FFN with plugins and LoRA layers computes what plain torch does with each request's adapter merged. With the wrapper
    that vLLM has on this machine: Triton kernels on a GPU, torch on a CPU."""
    torch.manual_seed(seed)
    dtype = getattr(torch, EXACT)
    cut, of_step, of_groups = random_batch(seed, [0, 5, 9])
    up, down = adapted_linear(lora, 64, 128, dtype), adapted_linear(lora, 128, 64, dtype)
    ffn = torch.nn.Sequential(up, torch.nn.SiLU(), down)
    plugins = {ratio: CompressionPlugin(64, ratio).to(DEVICE, dtype).requires_grad_(False) for ratio in (2, 4)}
    for plugin in plugins.values():
        for parameter in plugin.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    of_layer = {"attention": SimpleNamespace(segments=cut)}
    monkeypatch.setattr(lora.layers, "get_forward_context", lambda: SimpleNamespace(attn_metadata=of_layer))
    for layer in (up, down):
        layer.set_mapping(None)
    compressed = lora.layers.CompressedFFN(
        ffn.forward, plugins, "attention", lora.module.AdaptersOfGroups(manager(of_step)).of(ffn)
    )
    x = torch.randn(len(of_step), 64, dtype=dtype, device=DEVICE)
    found = torch.full_like(x, torch.nan)
    compressed.compute(x, found)
    at = 0
    for segment in cut:
        rows = x[segment.first : segment.end].float()
        plugin = plugins[segment.ratio].float() if segment.ratio > 1 else None
        pooled = plugin.pool(rows) if plugin else rows
        adapters, at = of_groups[at : at + segment.rows], at + segment.rows
        y = torch.stack([
            down.of_adapter(adapter) @ F.silu(up.of_adapter(adapter) @ row)
            for adapter, row in zip(adapters, pooled, strict=True)
        ])  # fmt: skip
        expected = plugin.expand(y, rows) if plugin else y
        torch.testing.assert_close(found[segment.first : segment.end].float(), expected, **TOLERANCE)
    assert at == len(of_groups)


TOLERANCE = {"rtol": 1e-4, "atol": 1e-4} if EXACT == "float32" else {"rtol": 0.05, "atol": 0.05}
"""Rounding of products in EXACT. Values are around 1, and another adapter changes them as much."""


def test_metadata_are_made_once_a_step(lora: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for each FFN; and anew where the step's adapters, their slots or its segments differ."""
    wrapper = mock.Mock()
    monkeypatch.setattr(lora.module, "get_punica_wrapper", lambda *_, **__: wrapper)
    cut, of_step, _ = random_batch(0, [5, 9])
    managing = manager(of_step)
    adapters = lora.module.AdaptersOfGroups(managing)
    ffns = [torch.nn.ModuleList([lora.Layer(), lora.Layer()]) for _ in range(3)]
    for layer in (layer for ffn in ffns for layer in ffn):
        layer.set_mapping("of the step")

    def made(segments: Sequence[Segment]) -> int:
        """How often metadata were made while three FFNs computed these segments."""
        before = wrapper.update_metadata.call_count
        for ffn in ffns:
            with adapters.of(ffn)(segments):
                assert [layer.punica_wrapper for layer in ffn] == [wrapper] * 2
        return int(wrapper.update_metadata.call_count - before)

    assert made(cut) == 1
    with adapters.of(torch.nn.Linear(1, 1))([]):  # adapters may be for other layers only
        pass
    assert wrapper.update_metadata.call_count == 1
    managing._last_mapping = replace(managing._last_mapping, index_mapping=(9, *of_step[1:-1], 5))
    assert made(cut) == 1
    managing.lora_index_to_id.reverse()
    assert made(cut) == 1
    assert made([*cut[:-1], replace(cut[-1], end=cut[-1].end - cut[-1].ratio)]) == 1
    with pytest.raises(RuntimeError, match="of the FFN"), adapters.of(ffns[0])(cut):
        raise RuntimeError("of the FFN")
    assert [layer.punica_wrapper for layer in ffns[0]] == ["of the step"] * 2
