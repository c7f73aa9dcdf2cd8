# SPDX-License-Identifier: Apache-2.0
"""Without an engine: the calibration of a layer, whose it is and where it comes from; whose queries are smoothed; and the
blocks of hybrid models."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import PLAIN, environment
from paged_batch import relative_error

from sage_backend import options, plugin
from sage_backend.demo import MODEL_DIR
from sage_backend.features import calibration_file
from sage_backend.tools.engines import Run
from sage_kernels import LayerCalibration, Modifiers, PagedBatch, reference
from sage_kernels.batch import NOT_CALIBRATED

HEADS, KV_HEADS, HEAD_DIM, PAGE = 4, 2, 64, 128


@pytest.fixture
def layer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What `SageImpl` sees of an attention layer with a soft cap, and a KV cache for it."""
    monkeypatch.setattr(options, "_current", options.SageOptions())  # not those of an earlier engine
    with environment():
        plugin.register()
        from sage_backend.engine.impl import SageImpl

        impl = SageImpl(HEADS, HEAD_DIM, 0.125, KV_HEADS, logits_soft_cap=5.0)
    content = options.SageOptions().layout(HEAD_DIM).bytes_per_token // 2
    cache = torch.zeros(2, KV_HEADS, PAGE, content, dtype=torch.bfloat16)
    return SimpleNamespace(impl=impl, kv_cache=cache, kv_sharing_target_layer_name=None)


def store(layer: Any, key: torch.Tensor, first_slot: int = 0) -> None:
    slots = torch.arange(first_slot, first_slot + len(key))
    with torch.inference_mode():
        layer.impl.do_kv_cache_update(layer, key, key, layer.kv_cache, slots)


def test_a_layer_is_neutral_until_it_is_calibrated(layer: Any) -> None:
    """Nothing that a layer stores changes its calibration, and a calibration is written into the same tensors: CUDA graphs have
    been captured with them."""
    key = torch.randn(20, KV_HEADS, HEAD_DIM)
    layer.impl.do_kv_cache_update(layer, key, key, torch.empty(0), torch.arange(20))
    assert layer.impl.calibration is NOT_CALIBRATED, "profiling"
    store(layer, key + 5)
    own = layer.impl.calibration
    assert not own.k_anchor.any()
    assert torch.equal(own.equalizer, torch.ones_like(own.equalizer))
    assert own.v_anchor is None
    k_anchor, equalizer, v_anchor = (torch.rand(KV_HEADS, HEAD_DIM) + 1 for _ in range(3))
    found = LayerCalibration(k_anchor, equalizer, None, v_anchor)
    with torch.inference_mode():
        layer.impl.calibrate(found, torch.device("cpu"))
    assert layer.impl.calibration is own
    assert torch.equal(own.k_anchor, found.k_anchor)
    assert torch.equal(own.equalizer, found.equalizer)
    assert own.v_anchor is None, "there may be graphs without an anchor of values"


def test_layers_that_share_keys_share_their_calibration(layer: Any) -> None:
    """With a soft cap, the result depends on all of it."""
    with environment():
        from vllm.forward_context import override_forward_context

        from sage_backend.engine.impl import SageImpl
        from sage_backend.engine.metadata import SageMetadata

        sharing = SageImpl(HEADS, HEAD_DIM, 0.125, KV_HEADS, logits_soft_cap=5.0, kv_sharing_target_layer_name="target")
    key = torch.randn(20, KV_HEADS, HEAD_DIM) + 3
    equalizer = torch.rand(KV_HEADS, HEAD_DIM) + 1
    layer.impl.calibrate(LayerCalibration(key.mean(0), equalizer, None, torch.randn(KV_HEADS, HEAD_DIM) + 3), key.device)
    own = layer.impl.calibration
    store(layer, key)
    table, lengths, starts = (torch.tensor(x, dtype=torch.int32) for x in ([[0]], [20], [0, 20]))
    metadata = SageMetadata.of(PagedBatch(table, lengths, starts, 1, 20), 20, num_decodes=0, num_decode_tokens=0)
    query = torch.randn(20, HEADS, HEAD_DIM)
    exact = reference.exact_attention(query, key, key, 0.125, Modifiers(soft_cap=5.0))

    def attend(impl: Any, target: str | None) -> torch.Tensor:
        asking = SimpleNamespace(kv_sharing_target_layer_name=target)
        return impl.forward(asking, query, None, None, layer.kv_cache, metadata, torch.empty_like(query))

    context = SimpleNamespace(no_compile_layers={"target": layer})
    with override_forward_context(context):
        assert torch.equal(attend(sharing, "target"), attend(layer.impl, None))
        assert relative_error(attend(sharing, "target"), exact) < 0.03
        for name in ("k_anchor", "equalizer", "v_anchor"):
            sharing.calibration = own
            assert torch.equal(attend(sharing, None), attend(layer.impl, None))
            sharing.calibration = replace(own, **{name: None})
            assert not torch.equal(attend(sharing, None), attend(layer.impl, None)), "this test would not notice"


def test_queries_of_prompts_are_smoothed(layer: Any) -> None:
    """Queries of decodes are not smoothed."""
    with environment():
        from sage_backend.engine.metadata import SageMetadata

    impl = layer.impl
    key = torch.randn(120, KV_HEADS, HEAD_DIM)
    store(layer, key)
    table, lengths, starts = (torch.tensor(x, dtype=torch.int32) for x in ([[0], [0]], [120, 100], [0, 3, 93]))
    requests = PagedBatch(table, lengths, starts, 3, 120)
    metadata = SageMetadata.of(requests, 93, num_decodes=1, num_decode_tokens=3, max_prefill_len=100)
    query = torch.randn(93, HEADS, HEAD_DIM)
    query[..., ::17] += 20
    outputs = []
    for impl.smooth_q in (False, True):
        outputs.append(impl.forward(layer, query, key, key, layer.kv_cache, metadata, torch.empty_like(query)))
    assert torch.equal(outputs[0][:3], outputs[1][:3])
    pages = impl.layout.pages(layer.kv_cache)
    plain = Modifiers(soft_cap=5.0, calibration=impl.calibration)
    expected = [
        reference.attention(query, pages, impl.layout, requests, 0.125, replace(plain, q_block=q_block))
        for q_block in (0, reference.tile_tokens(HEADS // KV_HEADS))
    ]
    for output, one, other in zip(outputs, expected, reversed(expected), strict=True):
        assert relative_error(output[3:], one[3:]) < 0.1 * relative_error(output[3:], other[3:])


def test_bounds_of_a_step_hold_for_all_that_runs_with_it() -> None:
    """Prompts and long drafts are given buffers for the longest context: in a graph, which is captured with short contexts,
    that of any step that replays it, and with slots that a drafter has added to contexts but not to their upper bounds."""
    with environment():
        from vllm.v1.attention.backend import CommonAttentionMetadata

        from sage_backend.engine.metadata import SageMetadataBuilder

        def common(queries: list[int], lengths: list[int], known: list[int], longest: int) -> Any:
            starts = torch.tensor([0, *queries]).cumsum(0).int()
            table, slots = torch.zeros(len(queries), 300, dtype=torch.int32), torch.zeros(sum(queries), dtype=torch.int64)
            return CommonAttentionMetadata(
                query_start_loc=starts, query_start_loc_cpu=starts, seq_lens=torch.tensor(lengths, dtype=torch.int32),
                seq_lens_cpu_upper_bound=torch.tensor(known, dtype=torch.int32), num_reqs=len(queries),
                num_actual_tokens=sum(queries), max_query_len=max(queries), max_seq_len=longest, block_table_tensor=table,
                slot_mapping=slots,
            )  # fmt: skip

        config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=32768))
        builder: Any = SimpleNamespace(
            reorder_batch_threshold=4, recorder=None, compressor=None, topk=None, workspace=None, vllm_config=config,
            layer_names=[],
        )  # fmt: skip
        builder.build = partial(SageMetadataBuilder.build, builder)
        captured = SageMetadataBuilder.build_for_cudagraph_capture(builder, common([6, 6], [6, 6], [6, 6], 32768))
        assert [phase.batch.max_seq_len for phase in captured.phases] == [32768]
        extended = builder.build(0, common([6, 6], [129, 100], [128, 99], 129))
        assert [phase.batch.max_seq_len for phase in extended.phases] == [129]
        mixed = builder.build(0, common([1, 6], [5000, 130], [5000, 130], 5000))
        assert [phase.batch.max_seq_len for phase in mixed.phases] == [5000, 130], "scratch memory is for what is widened"


@pytest.mark.parametrize("equalize", [False, True])
@pytest.mark.parametrize("smooth_k", [False, True])
@pytest.mark.parametrize("smooth_v", [False, True])
def test_a_worker_takes_its_share_of_a_calibration(
    layer: Any, smooth_k: bool, smooth_v: bool, equalize: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "calibration.safetensors"
    kinds = ("", ".equalizer", ".values")
    tensors = {f"attention{kind}": torch.rand(2 * KV_HEADS, HEAD_DIM) for kind in kinds}
    calibration_file.save(file, tensors, SimpleNamespace(model=str(MODEL_DIR), hf_config=SimpleNamespace()))
    monkeypatch.setattr("sage_backend.engine.impl.get_tensor_model_parallel_rank", lambda: 1)
    monkeypatch.setattr("sage_backend.engine.impl.get_tensor_model_parallel_world_size", lambda: 2)
    chosen = options.SageOptions(smooth_k=smooth_k, smooth_v=smooth_v, equalize=equalize)
    monkeypatch.setattr(options, "_current", chosen)
    impl, layer.layer_name = layer.impl, "attention"
    impl.calibration_file = str(file)
    for key in (torch.randn(20, KV_HEADS, HEAD_DIM), torch.ones(20, KV_HEADS, HEAD_DIM)):
        store(layer, key)
        own = impl.calibration
        found = zip((own.k_anchor, own.equalizer, own.v_anchor), kinds, (smooth_k, equalize, smooth_v), strict=True)
        for tensor, kind, wanted in found:
            assert torch.equal(tensor, tensors[f"attention{kind}"][KV_HEADS:]) if wanted else tensor is None


HYBRIDS: dict[str, dict[str, Any]] = {
    "Qwen3-Next-80B-A3B": {
        "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "hidden_size": 2048, "num_hidden_layers": 48,
        "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256, "linear_num_key_heads": 16,
        "linear_num_value_heads": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
        "full_attention_interval": 4, "vocab_size": 1000, "max_position_embeddings": 8192, "dtype": "bfloat16",
    },
    "Granite 4 hybrid": {
        "architectures": ["GraniteMoeHybridForCausalLM"], "model_type": "granitemoehybrid", "hidden_size": 1536,
        "num_hidden_layers": 8, "num_attention_heads": 12, "num_key_value_heads": 4, "num_local_experts": 0,
        "num_experts_per_tok": 0, "layer_types": ["mamba"] * 5 + ["attention"] + ["mamba"] * 2, "mamba_n_heads": 48,
        "mamba_d_head": 64, "mamba_d_state": 128, "mamba_n_groups": 1, "mamba_d_conv": 4, "mamba_expand": 2,
        "vocab_size": 1000, "max_position_embeddings": 8192, "dtype": "bfloat16",
    },
}  # fmt: skip
"""The parts of two models' configurations that decide about the sizes of their caches."""


BLOCKS = {
    "Qwen3-Next-80B-A3B": [544, 1152, 1408, 1920] if torch.cuda.is_available() else [1152, 2176, 2560, 3584],
    "Granite 4 hybrid": [400, 768, 1024, 1280] if torch.cuda.is_available() else [896, 1536, 1920, 2560],
}
"""On a CPU, vLLM keeps states in float32."""


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_hybrid_models(name: str, tmp_path: Path) -> None:
    """A block has at least as many bytes in an attention layer as the state of a layer without: the fewer bytes a token has,
    the more tokens a block, and the prefix cache counts in blocks. docs/user/compatibility.md names these."""
    (tmp_path / "config.json").write_text(json.dumps(HYBRIDS[name]))
    found = []
    with environment():
        plugin.register()
        from vllm.config import set_current_vllm_config
        from vllm.engine.arg_utils import EngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        for run in (PLAIN, "SAGE", "SAGE:k_bits=4", "SAGE:k_bits=4,v_bits=4"):
            parsed = Run.parse(run)
            arguments: dict[str, Any] = {
                "attention_backend": parsed.backend,
                "enable_prefix_caching": True,
                "load_format": "dummy",
            }
            arguments |= {"skip_tokenizer_init": True, "additional_config": {"sage": parsed.options}}
            made = EngineArgs(str(tmp_path), **arguments).create_engine_config()
            with set_current_vllm_config(made):
                options.current()  # as where an engine's layers are made
            current_platform._align_hybrid_block_size(made, AttentionBackendEnum[parsed.backend].get_class())
            found.append(made.cache_config.block_size)
    assert found == BLOCKS[name]
