# SPDX-License-Identifier: Apache-2.0
"""Compression plugins: what they compute and which tokens they compress, ratios, files, and refusals."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from engines import NGRAM_DRAFTS, environment
from loud_plugins import LAYERS, loud_plugins

from sage_backend.demo import MODEL_DIR
from sage_backend.engine.patches import block_hash
from sage_backend.engine.patches import scheduler as scheduling
from sage_backend.options import RATIOS, SageOptions, VariatorOptions
from sage_backend.variator import files
from sage_backend.variator.admission import PLAN_KEY, RATIO, TAIL, Policy, check_request
from sage_backend.variator.groups import CHUNK, PLAIN, START, CompressionPlan, Segment, clip, segments
from sage_backend.variator.plugin import CompressionPlugin

# The plugin


@pytest.mark.parametrize("ratio", RATIOS)
def test_an_untrained_plugin_averages_and_repeats(ratio: int) -> None:
    plugin, x = CompressionPlugin(32, ratio), torch.randn(3, 5 * ratio, 32)
    pooled = plugin.pool(x)
    torch.testing.assert_close(pooled, x.view(3, 5, ratio, 32).mean(2))
    torch.testing.assert_close(plugin.expand(pooled, x), pooled.repeat_interleave(ratio, 1))


def test_a_plugin_in_formulas() -> None:
    plugin, x, y = CompressionPlugin(32, 4).double(), torch.randn(12, 32).double(), torch.randn(3, 32).double()
    for parameter in plugin.parameters():
        torch.nn.init.normal_(parameter)
    weights = plugin.weigh(x.view(3, 4 * 32)).softmax(-1)
    torch.testing.assert_close(plugin.pool(x), torch.einsum("gk,gkh->gh", weights, x.view(3, 4, 32)))
    repeated = y.repeat_interleave(4, 0)
    adapted = plugin.up(F.gelu(plugin.down(torch.cat([repeated, x], -1))))
    torch.testing.assert_close(plugin.expand(y, x), repeated + adapted)


def test_plugins_are_small() -> None:
    """Those of ratios 2 and 4 together, for all layers but two of a model like Llama 3.1 8B with 8.03 billion parameters."""
    with torch.device("meta"):
        parameters = sum(p.numel() for ratio in (2, 4) for p in CompressionPlugin(4096, ratio).parameters())
    assert 30 * parameters < 0.0065 * 8.03e9


# Groups


def by_token(requests: list[tuple[int, int, CompressionPlan]]) -> list[int]:
    """The ratio of every row, by definition. requests: position of the first token, number of tokens, CompressionPlan."""
    ratios = []
    for position, tokens, reading in requests:
        for at in range(position, position + tokens):
            first = at // reading.ratio * reading.ratio
            whole = max(position, START) <= first and first + reading.ratio <= min(position + tokens, reading.limit)
            ratios.append(reading.ratio if whole else 1)
    return ratios


def test_segments() -> None:
    rng = Random(0)
    compressed = 0
    for _ in range(500):
        requests, rows = [], [0]
        for _ in range(rng.randint(1, 4)):
            reading = rng.choice([PLAIN, CompressionPlan.of(rng.randint(1, 90), rng.choice(RATIOS), rng.randint(16, 40))])
            requests.append((rng.randint(0, 60), rng.randint(1, 60), reading))
            rows.append(rows[-1] + requests[-1][1])
        expected = by_token(requests)
        cut = segments((rows[i], rows[i + 1], position, reading) for i, (position, _, reading) in enumerate(requests))
        if max(expected) == 1:
            assert cut == []
            continue
        compressed += 1
        assert [segment.ratio for segment in cut for _ in range(segment.first, segment.end)] == expected
        assert [segment.first for segment in cut] == [0, *(segment.end for segment in cut[:-1])]
        assert all(a.ratio != b.ratio for a, b in pairwise(cut))
    assert compressed > 100


def test_chunks_do_not_matter() -> None:
    """However the scheduler's budgets cut a prompt, the same tokens are compressed."""
    rng = Random(0)
    for _ in range(200):
        prompt = rng.randint(1, 600)
        reading = CompressionPlan.of(prompt, rng.choice(RATIOS), rng.randint(16, 100))
        ratios: list[int] = []
        while len(ratios) < prompt:
            tokens = clip(min(rng.randint(CHUNK, 150), prompt - len(ratios)), len(ratios), reading)
            ratios += by_token([(len(ratios), tokens, reading)])
        assert ratios == by_token([(0, prompt, reading)])
        assert ratios.count(1) == prompt - max(0, reading.limit - START)


def test_rows() -> None:
    assert [Segment(0, 8, 1).rows, Segment(8, 24, 4).rows] == [8, 4]
    assert CompressionPlan.of(100, 4, 30) == (4, 68)
    assert CompressionPlan.of(100, 1, 30) == PLAIN
    assert CompressionPlan.of(20, 2, 30).limit == 0
    assert [CompressionPlan.of(START + 30 + tokens, 2, 30).limit for tokens in (0, 1, 2)] == [0, 0, START + 2]


# The choice of a ratio


def test_policy() -> None:
    """The ratio goes up one step at a time under high load and down under low load. In between it stays."""
    policy = Policy([1, 2, 4], waiting=8, kv_use=0.9)
    waiting = [0, 7, 8, 7, 4, 8, 20, 20, 4, 3, 5, 3, 0]
    assert [policy.choose(each, 0.5) for each in waiting] == [1, 1, 2, 2, 2, 4, 4, 4, 4, 2, 2, 1, 1]
    assert [policy.choose(0, use) for use in (0.95, 0.8, 0.9, 0.71, 0.5)] == [2, 2, 4, 2, 1]


def test_choices() -> None:
    def choices(**options: Any) -> list[int]:
        return VariatorOptions("file", **options).choices((2, 4))

    assert choices() == [1, 2, 4]
    assert choices(min_ratio=2) == [2, 4]
    assert choices(max_ratio=2) == [1, 2]
    assert choices(ratio=4) == [4]
    with pytest.raises(ValueError, match="file has no plugins of ratio 8; there is 2 or 4"):
        choices(ratio=8)
    with pytest.raises(ValueError, match="file has no plugins of ratio 8 to 8; there is 2 or 4"):
        choices(min_ratio=8)


class WaitingRequest:
    """The part of vLLM's Request that is used."""

    def __init__(self, prompt: int, parameters: Any) -> None:
        self.num_prompt_tokens, self.sampling_params, self.num_computed_tokens = prompt, parameters, 0
        self.block_hashes = ["hashed as it came"]

    def update_block_hashes(self) -> None:
        self.block_hashes.append(f"hashed for {getattr(self, PLAN_KEY)}")


def attached(load: SimpleNamespace, cached: Callable[[WaitingRequest], int], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The part of vLLM's scheduler that is used, with plugins of ratios 2 and 4. Its prefix cache has `cached` tokens of a
    request, and lookups return the request's hashes and that number."""
    monkeypatch.setattr(block_hash, "apply", lambda: None)
    scheduler = SimpleNamespace(
        _get_local_prefix_cache_hit=lambda request: (tuple(request.block_hashes), cached(request)),
        need_mamba_block_aligned_split=False,
        _mamba_block_aligned_split=None,
        get_request_counts=lambda: (0, load.waiting),
        get_kv_cache_usage=lambda: 0.0,
    )
    scheduling.attach(scheduler, VariatorOptions("file", waiting=8), [2, 4])
    return scheduler


def test_admission(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request gets its ratio at its first lookup in the prefix cache, and keeps it at lookups after a preemption."""
    load = SimpleNamespace(waiting=9)
    scheduler = attached(load, lambda request: 0, monkeypatch)
    shared = SimpleNamespace(extra_args=None)
    first, second, short = (WaitingRequest(tokens, shared) for tokens in (200, 200, 40))

    def hashed(request: WaitingRequest) -> tuple[str, ...]:
        return scheduler._get_local_prefix_cache_hit(request)[0]

    assert hashed(first) == ("hashed for CompressionPlan(ratio=2, limit=136)",)
    assert hashed(second) == ("hashed for CompressionPlan(ratio=4, limit=136)",)
    load.waiting = 1
    for _ in range(3):
        assert hashed(second) == ("hashed for CompressionPlan(ratio=4, limit=136)",)
    assert [request.sampling_params.extra_args for request in (first, second)] == [{PLAN_KEY: [2, 136]}, {PLAN_KEY: [4, 136]}]
    assert shared.extra_args is None
    own = WaitingRequest(200, SimpleNamespace(extra_args={RATIO: 1, "other": 5}))
    for plain in (short, own, WaitingRequest(200, None)):
        assert hashed(plain) == ("hashed as it came",)
    assert own.sampling_params.extra_args == {RATIO: 1, "other": 5, PLAN_KEY: [1, 0]}

    assert scheduler.need_mamba_block_aligned_split
    split = scheduler._mamba_block_aligned_split
    assert [split(first, 100), split(first, 100, 64, 0), split(own, 101)] == [96, 100, 101]
    first.num_computed_tokens = 96
    assert [split(first, 30), split(first, 15), split(first, 41)] == [16, 0, 41]
    first.num_computed_tokens = 128  # 8 tokens of the last groups are left: in a small chunk, they would count as a decode
    assert [split(first, 15), split(first, 16)] == [0, 16]
    first.num_computed_tokens = 136
    assert split(first, 3) == 3


@pytest.mark.parametrize(
    ("cached", "plan"),
    [
        ({}, (4, 936)),  # nothing is cached: 1000 tokens, of which 920 cost half
        ({1: 128, 2: 0, 4: 0}, (4, 936)),  # a little under a smaller ratio: 872 tokens would be left, instead of 540
        ({1: 768, 2: 0, 4: 0}, (1, 0)),  # 232 instead of 540
        ({1: 768, 2: 768, 4: 0}, (2, 936)),  # 176
        ({1: 768, 2: 896, 4: 896}, (4, 936)),  # 90.7 and 84
        ({1: 896, 2: 640, 4: 640}, (1, 0)),  # 104 instead of 261.3 and 212
    ],
)
def test_the_cache_counts(cached: Mapping[int, int], plan: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Under high load, a request gets the ratio that leaves the least to compute. Its blocks are hashed for that one."""
    load = SimpleNamespace(waiting=9)
    scheduler = attached(load, lambda request: cached.get(getattr(request, PLAN_KEY, PLAIN).ratio, 0), monkeypatch)
    scheduler._get_local_prefix_cache_hit(WaitingRequest(1000, SimpleNamespace(extra_args=None)))  # one step up
    request = WaitingRequest(1000, SimpleNamespace(extra_args=None))
    hashes, found = scheduler._get_local_prefix_cache_hit(request)
    assert getattr(request, PLAN_KEY) == plan
    assert hashes[-1] == f"hashed for {CompressionPlan(*plan)}"
    assert found == cached.get(plan[0], 0)
    load.waiting = 1  # a request is never compressed more than the load asks for
    for _ in range(2):
        relaxed = WaitingRequest(1000, SimpleNamespace(extra_args=None))
        scheduler._get_local_prefix_cache_hit(relaxed)
    assert getattr(relaxed, PLAN_KEY) == PLAIN


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("file", '"variator" in --additional-config "sage" must be an object such as {"plugins": "FILE"}, not \'file\''),
        ({"ratio": 2}, '"variator" in --additional-config "sage" must be an object such as {"plugins": "FILE"}'),
        ({"plugins": ""}, 'option "plugins" in --additional-config "sage", "variator" is \'\'; it can be a file'),
        ({"ratio": 3}, '"ratio" in --additional-config "sage", "variator" is 3; it can be "auto", 2, 4 or 8'),
        ({"ratio": "2"}, '"ratio" in --additional-config "sage", "variator" is \'2\'; it can be "auto", 2, 4 or 8'),
        ({"min_ratio": 3}, "is 3; it can be 1, 2, 4 or 8"),
        ({"waiting": 0}, "is 0; it can be a number of requests from 1 on"),
        ({"kv_use": 1.5}, "is 1.5; it can be a share above 0 and up to 1"),
        ({"tail": 8}, "is 8; it can be a number of tokens from 16 on"),
        ({"speed": 2}, 'unknown option "speed" in --additional-config "sage", "variator"; options are kv_use, max_ratio, '),
        ({"ratio": 2, "max_ratio": 4}, 'go with "ratio": "auto", not 2'),
        ({"min_ratio": 4, "max_ratio": 2}, '"min_ratio" in --additional-config "sage", "variator" is 4, and "max_ratio" only'),
    ],
)
def test_options(section: Any, message: str) -> None:
    section = {"plugins": "file", **section} if isinstance(section, dict) and message.find("FILE") < 0 else section
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        SageOptions.parse({"sage": {"variator": section}})
    assert "\n" not in str(caught.value)


def test_requests() -> None:
    for good in ({}, {RATIO: 1}, {RATIO: 4, TAIL: 16}):
        check_request(SimpleNamespace(extra_args=good), [2, 4])
    check_request(SimpleNamespace(), [2, 4])  # of a pooling model
    with pytest.raises(ValueError, match="sage_ratio is 8; this server has 1, 2, 4"):
        check_request(SimpleNamespace(extra_args={RATIO: 8}), [2, 4])
    with pytest.raises(ValueError, match="sage_tail is 0; it can be a number of tokens from 16 on"):
        check_request(SimpleNamespace(extra_args={TAIL: 0}), [2, 4])


# Files


def model_config(model: Path) -> Any:
    """The part of vLLM's ModelConfig that is read."""
    return SimpleNamespace(model=str(model), hf_config=transformers.AutoConfig.from_pretrained(model))


def test_files(tmp_path: Path) -> None:
    path = loud_plugins(tmp_path)
    assert files.check(str(path), model_config(MODEL_DIR)) == (2, 4)
    loaded = files.load(str(path), LAYERS[1], 256, [4])
    torch.manual_seed(0)
    [x] = torch.randn(1, 8, 256, dtype=torch.bfloat16)
    assert list(loaded) == [4]
    assert loaded[4].pool(x).std() > 0.1
    assert not any(parameter.requires_grad for parameter in loaded[4].parameters())


def test_unusable_files(tmp_path: Path) -> None:
    path, known = loud_plugins(tmp_path), model_config(MODEL_DIR)
    other = tmp_path / "other"
    shutil.copytree(MODEL_DIR, other)
    (other / "config.json").write_text((other / "config.json").read_text().replace("10000.0", "20000.0"))
    with pytest.raises(ValueError, match=f"is of another model; make one with: sage variator train {other}"):
        files.check(str(path), model_config(other))
    with pytest.raises(ValueError, match="there is no plugin file nowhere; make one with: sage variator train"):
        files.check("nowhere", known)
    with pytest.raises(ValueError, match="is not a plugin file of this release"):
        files.check(str(MODEL_DIR / "model.safetensors"), known)
    incomplete = files.make(LAYERS, [2], 256)
    del incomplete[LAYERS[0]][2].up
    files.save(tmp_path / "incomplete", incomplete, known.model, known.hf_config)
    with pytest.raises(ValueError, match="is not a complete plugin file"):
        files.check(str(tmp_path / "incomplete"), known)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="is not a plugin file or is damaged"):
        files.check(str(path), known)
    with pytest.raises(ValueError, match=f"do not know models of type gpt2; there is {', '.join(files.MODEL_TYPES)}; leave"):
        files.check(str(path), SimpleNamespace(hf_config=transformers.GPT2Config()))


FORK = """
import os, sys, torch, transformers
from types import SimpleNamespace
from sage_backend.variator import files
torch.set_num_threads(2)
config = transformers.AutoConfig.from_pretrained(sys.argv[1])
files.check(sys.argv[2], SimpleNamespace(model=sys.argv[1], hf_config=config))
child = os.fork()
if child == 0:
    files.load(sys.argv[2], "model.layers.1.mlp", config.hidden_size, [2])
    torch.ones(1 << 22).mul_(2)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""


def test_an_engine_can_be_forked_after_a_file_was_checked(tmp_path: Path) -> None:
    """On a GPU, vLLM forks its engine from the process that checks options. If that process had started torch's threads, as
    initializing plugins of this size would, the engine would wait for them forever."""
    config = transformers.LlamaConfig(hidden_size=4096, num_hidden_layers=3)
    config.save_pretrained(tmp_path)
    path = tmp_path / "plugins"
    files.save(path, files.make(LAYERS[:1], [2], 4096), str(tmp_path), config)
    subprocess.run([sys.executable, "-c", FORK, str(tmp_path), str(path)], check=True, timeout=600)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_num_batched_tokens": 8, "max_num_seqs": 8, "max_model_len": 8}, "chunks of 8 tokens have no room for groups"),
        ({"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}, "blocks that leave the engine"),
        ({"ratio": 8}, "has no plugins of ratio 8; there is 2 or 4"),
        ({"speculative_config": {**NGRAM_DRAFTS, "num_speculative_tokens": 15}}, "drafts of 15 tokens are verified in steps"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Refused where the configuration is made, in one line."""
    ratio = {"ratio": arguments.pop("ratio")} if "ratio" in arguments else {}
    options = {"smooth_k": False, "variator": {"plugins": str(loud_plugins(tmp_path)), **ratio}}
    with environment():
        from vllm.engine.arg_utils import EngineArgs

        from sage_backend import plugin

        plugin.register()
        made = EngineArgs(str(MODEL_DIR), attention_backend="SAGE", additional_config={"sage": options}, **arguments)
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            made.create_engine_config()
    assert "\n" not in str(caught.value)


def test_compilation(tmp_path: Path) -> None:
    """When vLLM compiles a model in pieces, the op is between them."""
    options = {"variator": {"plugins": str(loud_plugins(tmp_path))}}
    with environment():
        from vllm.compilation.backends import split_graph
        from vllm.engine.arg_utils import EngineArgs

        from sage_backend import plugin
        from sage_backend.variator.layers import _call

        plugin.register()
        pieces = {"splitting_ops": ["vllm::unified_attention_with_output"]}
        compiled = {"compilation_config": pieces, "additional_config": {"sage": options}}
        config = EngineArgs(str(MODEL_DIR), attention_backend="SAGE", **compiled).create_engine_config()
        assert config.compilation_config.splitting_ops == [*pieces["splitting_ops"], "sage::ffn"]
        assert {op for op in config.compilation_config.custom_ops if "_and_mul" in op} == {"+silu_and_mul"}

        graphs = []

        def backend(graph: Any, _: Any) -> Any:
            graphs.append(split_graph(graph, config.compilation_config.splitting_ops)[1])
            return graph.forward

        ffn = torch.nn.Identity()
        ffn.forward = _call(LAYERS[0])  # as in a model with plugins
        torch.compile(lambda x: ffn(x + 1) * 2, backend=backend, fullgraph=True)(torch.ones(4, 8, device="meta"))
        assert [piece.is_splitting_graph for piece in graphs[0]] == [False, True, False]


def test_other_layers_are_compiled_anew(tmp_path: Path) -> None:
    """vLLM's cache of compiled models tells plugin files of other layers apart, also under the same name."""
    with environment():
        from vllm.engine.arg_utils import EngineArgs

        from sage_backend import plugin

        plugin.register()
        hashes, given = [], {"sage": {"variator": {"plugins": str(tmp_path / "plugins.safetensors")}}}
        for layers in (LAYERS, LAYERS[:1], LAYERS):
            loud_plugins(tmp_path, layers=layers)
            made = EngineArgs(str(MODEL_DIR), attention_backend="SAGE", additional_config=given).create_engine_config()
            hashes.append(made.compute_hash())
    assert hashes[0] == hashes[2] != hashes[1]
    assert given.keys() == {"sage"}, "the user's own was changed"


def test_random_plugins_of_the_benchmark(tmp_path: Path) -> None:
    from common.plugins import random_plugins
    from common.shapes import SHAPES

    shape = {**SHAPES["llama-3.1-8b"], "hidden_size": 256, "num_hidden_layers": 4}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    path = random_plugins(str(tmp_path))
    assert files.check(path, model_config(tmp_path)) == RATIOS
    assert files.contents(path)[0] == LAYERS
