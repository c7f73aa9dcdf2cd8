# SPDX-License-Identifier: Apache-2.0
"""Compression plugins: what they compute, which tokens they compress, how they are trained, and how an engine serves them."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from engines import (
    EXACT,
    NEAR_TIE,
    NGRAM_DRAFTS,
    Answer,
    assert_same_tokens,
    engine,
    environment,
    give_two_workers_cores,
    heldout_prompts,
    metric,
    random_prompts,
    save_random_model,
)
from prometheus_client import REGISTRY
from safetensors.torch import load_file

from sage_backend.demo import HELDOUT, MODEL_DIR, PLUGINS
from sage_backend.engine.patches import block_hash
from sage_backend.engine.patches import scheduler as scheduling
from sage_backend.options import MIN_TAIL, RATIOS, SageOptions, VariatorOptions
from sage_backend.tools import cli, quality
from sage_backend.variator import files, train
from sage_backend.variator.admission import PLAN_KEY, RATIO, TAIL, Policy, check_request
from sage_backend.variator.groups import CHUNK, PLAIN, START, CompressionPlan, Segment, clip, segments
from sage_backend.variator.plugin import CompressionPlugin

LAYERS = ["model.layers.1.mlp", "model.layers.2.mlp"]


def loud_plugins(folder: Path, model: Path = MODEL_DIR, ratios: Sequence[int] = (2, 4)) -> Path:
    """A file of random plugins: they change what they compress so much that it is clearly noticed."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(model)
    plugins = files.make(LAYERS, list(ratios), config.hidden_size)
    for by_ratio in plugins.values():
        for plugin in by_ratio.values():
            for parameter in plugin.parameters():
                torch.nn.init.normal_(parameter, std=0.3)
    path = folder / "plugins.safetensors"
    files.save(path, plugins, str(model), config)
    return path


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
        ({"pipeline_parallel_size": 2}, "pipeline parallelism is not supported; use --tensor-parallel-size"),
        ({"enable_lora": True}, "LoRA is not supported"),
        ({"max_num_batched_tokens": 8, "max_num_seqs": 8, "max_model_len": 8}, "chunks of 8 tokens have no room for groups"),
        ({"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}, "blocks that leave the engine"),
        ({"ratio": 8}, "has no plugins of ratio 8; there is 2 or 4"),
        ({"speculative_config": {**NGRAM_DRAFTS, "num_speculative_tokens": 15}}, "drafts of 15 tokens are verified in steps"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Refused where the configuration is made, in one line."""
    if "pipeline_parallel_size" in arguments and torch.cuda.device_count() == 1:
        pytest.skip("vLLM refuses it itself on one GPU")
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


def test_random_plugins_of_the_benchmark(tmp_path: Path) -> None:
    from common.plugins import random_plugins
    from common.shapes import SHAPES

    shape = {**SHAPES["llama-3.1-8b"], "hidden_size": 256, "num_hidden_layers": 4}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    path = random_plugins(str(tmp_path))
    assert files.check(path, model_config(tmp_path)) == RATIOS
    assert files.contents(path)[0] == LAYERS


# Training


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of four small layers with the embedded model's tokenizer, to train plugins for."""
    folder = tmp_path_factory.mktemp("small")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "vocab_size": 4096}
    save_random_model(folder, transformers.LlamaConfig(**sizes, initializer_range=0.3))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL_DIR / name, folder)
    return folder


def run_training(model: Path, out: Path, *more: str) -> int:
    sizes = ["--rows", "2", "--context", "128", "--layer-steps", "80", "--joint-steps", "80", "--recall", "0.3"]
    arguments = ["--text", str(HELDOUT), "--out", str(out), *sizes, "--device", "cpu", *more]
    return cli_main(["variator", "train", str(model), *arguments])


def cli_main(arguments: list[str]) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["sage", *arguments])
        return cli.main()


def test_training(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Plugins get better in both phases. Training that was interrupted and resumed ends with the same plugins, of the same
    layers."""
    assert run_training(small, tmp_path / "whole", "--layers", "2") == 0
    layers, _ = files.contents(str(tmp_path / "whole"))
    assert len(layers) == 2
    numbers = ", ".join(layer.split(".")[2] for layer in layers)
    assert capsys.readouterr().out.endswith(f" of the model's; layers {numbers}\n")
    model = transformers.AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)
    batches = train.Batches(transformers.AutoTokenizer.from_pretrained(small), HELDOUT.read_text(), 4, 128, 0.0, seed=5)

    @torch.no_grad()
    def losses(plugins: files.Plugins) -> tuple[float, float]:
        attached = train.Attached(model, plugins)
        alone = sum(train.layer_loss(attached, batches.draw(i)).item() for i in range(4))
        together = sum(train.joint_loss(attached, batches.draw(i), 2).item() for i in range(4))
        for layer, plain in attached.plain.items():
            model.get_submodule(layer).forward = plain
        return alone, together

    untrained = losses(files.make(layers, [2, 4], 32))
    trained = {layer: files.load(str(tmp_path / "whole"), layer, 32, [2, 4]) for layer in layers}
    for by_ratio in trained.values():
        for plugin in by_ratio.values():
            plugin.float()
    now = losses(trained)
    assert now[0] < 0.98 * untrained[0], (now, untrained)
    assert now[1] < 0.98 * untrained[1], (now, untrained)

    advance = train.Training.advance
    monkeypatch.setattr(train, "CHECKPOINT_EVERY", 20)

    def interrupt(self: train.Training) -> tuple[str, float]:
        if self.step == 105:
            raise KeyboardInterrupt
        return advance(self)

    monkeypatch.setattr(train.Training, "advance", interrupt)
    assert run_training(small, tmp_path / "resumed", "--layers", "2") == 1
    saved = tmp_path / "resumed.checkpoint"
    assert saved.is_file()
    assert "error: interrupted after 105 steps; --resume continues from step 100\n" in capsys.readouterr().err
    monkeypatch.setattr(train.Training, "advance", advance)
    assert run_training(small, tmp_path / "resumed", "--resume") == 1
    assert "is of a training with layers 2, not None; use the same arguments" in capsys.readouterr().err
    assert run_training(small, tmp_path / "resumed", "--layers", "2", "--resume") == 0
    whole, resumed = (load_file(tmp_path / name) for name in ("whole", "resumed"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["resumed", "whole"]


def test_choice_of_layers(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers whose plugins move the predictions most are left out, and run as in the plain model from then on."""
    monkeypatch.setattr(train, "LOGIT_ROWS", 50)
    model = transformers.AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)
    torch.manual_seed(0)
    layers = files.all_layers(model.config)
    plugins = files.make(layers, [2], 32)
    for layer, scale in zip(layers, (0.0, 100.0, 100.0, 0.0), strict=True):
        torch.nn.init.normal_(plugins[layer][2].up.bias, std=scale)
    torch.nn.init.zeros_(model.get_submodule(layers[0]).down_proj.weight)  # the first layer's FFN is not missed at all
    batches = train.Batches(transformers.AutoTokenizer.from_pretrained(small), HELDOUT.read_text(), 1, 128, 0.0, seed=5)
    attached = train.Attached(model, plugins)
    training = train.Training(attached, batches, {"layers": 1, "joint": 1}, 2)
    batch = batches.draw(0)
    with torch.no_grad():
        plain = attached.hidden(batch)
        with attached.compressing(2, batch.cut, [layers[1]]):
            quiet = attached.hidden(batch)
        expected = F.kl_div(
            attached.log_probabilities(quiet), attached.log_probabilities(plain), reduction="batchmean", log_target=True
        )
        torch.testing.assert_close(attached.divergence(plain, quiet), expected)
        training.choose()
        assert sorted(plugins) == [layers[0], layers[3]]
        with attached.compressing(2, batch.cut, []):
            assert torch.equal(attached.hidden(batch), plain)
    left_out = model.get_submodule(layers[1])
    assert left_out.forward.__func__ is type(left_out).forward


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "EMPTY"], "EMPTY is not a file with text"),
        (["--context", "64"], "--context must be at least 128"),
        (["--layers", "5"], "--layers is 5; it can be 1 to 4 for this model"),
        (["--out", "NOWHERE/p"], "there is no folder"),
        (["--resume"], "to resume from; leave --resume out"),
        (["--context", "200000"], "training needs more than --context"),
    ],
)
def test_bad_input(
    arguments: list[str], message: str, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "EMPTY").touch()
    arguments = [str(tmp_path / each) if each == "EMPTY" else each for each in arguments]
    capsys.readouterr()
    assert run_training(small, tmp_path / "out", *arguments) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]


# Engines

LENGTHS = (700, 300, 129 + START, 400, 90)
OPTIONS = {"smooth_k": False}


def ask(llm: Any, prompts: Sequence[list[int]], asked: Sequence[dict[str, int]], tokens: int = 16) -> list[Answer]:
    """Continue the prompts as one batch. asked: the extra arguments of each."""
    from vllm import SamplingParams

    fixed = {"temperature": 0, "max_tokens": tokens, "ignore_eos": True, "logprobs": 2, "detokenize": False}
    parameters = [SamplingParams(**fixed, extra_args=dict(each)) for each in asked]
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], parameters, use_tqdm=False)
    answers = []
    for output in outputs:
        best = [sorted((each.logprob for each in at.values()), reverse=True) for at in output.outputs[0].logprobs]
        margins = [first - second for first, second, *_ in best]
        answers.append(Answer(list(output.outputs[0].token_ids), margins, output.num_cached_tokens))
    return answers


def ask_all(llm: Any, prompts: Sequence[list[int]], ratio: int) -> list[Answer]:
    return ask(llm, prompts, [asking(ratio)] * len(prompts))


def asking(ratio: int) -> dict[str, int]:
    """With the shortest possible tail, because the answer depends on the tail most."""
    return {RATIO: ratio, TAIL: MIN_TAIL}


def compressing(plugins: Path, dtype: str = EXACT, **arguments: Any) -> Any:
    """An engine with plugins that chooses ratios by load."""
    options = {**OPTIONS, "variator": {"plugins": str(plugins), "waiting": 4}}
    return engine(dtype=dtype, additional_config={"sage": options}, **arguments)


@pytest.fixture(scope="module")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return loud_plugins(tmp_path_factory.mktemp("plugins"))


@pytest.fixture(scope="module")
def plain() -> tuple[list[list[int]], list[Answer]]:
    """Prompts, and the answers of an engine without plugins."""
    with engine(dtype=EXACT, additional_config={"sage": OPTIONS}) as llm:
        prompts = heldout_prompts(llm, LENGTHS)
        return prompts, ask_all(llm, prompts, 1)


@pytest.fixture(scope="module")
def served(plugins: Path, plain: tuple[list[list[int]], list[Answer]]) -> Iterator[Any]:
    """This engine ends when a test starts another one, so the tests that use it come first."""
    with compressing(plugins, enable_prefix_caching=True, max_num_batched_tokens=2048, max_num_seqs=4) as llm:
        yield llm


@pytest.fixture(scope="module")
def answers(served: Any, plain: tuple[list[list[int]], list[Answer]]) -> dict[int, list[Answer]]:
    """Answers of the compressing engine, by ratio, each from an empty prefix cache."""
    found = {}
    for ratio in (1, 2, 4):
        assert served.reset_prefix_cache()
        found[ratio] = ask_all(served, plain[0], ratio)
        assert not any(answer.cached for answer in found[ratio])
    return found


def counted(name: str) -> dict[str, float]:
    """A metric's values by ratio, summed over all engines that this process has had."""
    found: dict[str, float] = {}
    for family in REGISTRY.collect():
        for sample in family.samples:
            if sample.name == name:
                ratio = sample.labels.get("ratio", "")
                found[ratio] = found.get(ratio, 0) + sample.value
    return found


def change(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    return {ratio: after[ratio] - before.get(ratio, 0) for ratio in after if after[ratio] != before.get(ratio, 0)}


def distance(a: Answer, b: Answer) -> float:
    """The mean difference of the tokens' margins, in nats, up to the first token that differs. There the difference is the sum
    of both margins: each answer prefers its token to the other's by that much or more."""
    same = next((i for i, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=True)) if x != y), len(a.tokens))
    parts = [abs(x - y) for x, y in zip(a.margins[:same], b.margins[:same], strict=True)]
    if same < len(a.tokens):
        parts.append(a.margins[same] + b.margins[same])
    return sum(parts) / len(parts)


TIE, NOISE = (0.0, 0.1) if EXACT == "float32" else (NEAR_TIE, 0.2)
"""Bounds for answers that count as the same, in nats: on the margin of a token that differs, and on their distance."""


def assert_same(actual: Sequence[Answer], expected: Sequence[Answer], near_tie: float = 0.0) -> None:
    assert_same_tokens(actual, expected, max(near_tie, TIE))
    assert max(map(distance, actual, expected)) < NOISE


@pytest.mark.engine
def test_ratios_are_told_apart(answers: dict[int, list[Answer]], plain: tuple[list[list[int]], list[Answer]]) -> None:
    """Without compression, the tokens are those of the plain engine. With these plugins, every ratio gives other answers."""
    assert_same(answers[1], plain[1])
    for i, length in enumerate(LENGTHS):
        for a, b in ((1, 2), (1, 4), (2, 4)):
            assert distance(answers[a][i], answers[b][i]) > 2 * NOISE, f"prompt of {length}, ratios {a} and {b}"


@pytest.mark.engine
def test_mixed_load(served: Any, answers: dict[int, list[Answer]], plain: tuple[list[list[int]], list[Answer]]) -> None:
    """Requests of all ratios in one batch: each gets the same as in a batch of its own ratio."""
    for shift in range(3):
        assert served.reset_prefix_cache()
        ratios = [(1, 2, 4)[(i + shift) % 3] for i in range(len(LENGTHS))]
        mixed = ask(served, plain[0], [asking(ratio) for ratio in ratios])
        assert_same(mixed, [answers[ratio][i] for i, ratio in enumerate(ratios)])


@pytest.mark.engine
def test_prefix_cache(served: Any, answers: dict[int, list[Answer]], plain: tuple[list[list[int]], list[Answer]]) -> None:
    """Blocks are found again with the ratio that they were computed with, and with no other."""
    assert served.reset_prefix_cache()
    for ratio in (4, 1, 2):
        for cached in (False, True):
            found = ask_all(served, plain[0], ratio)
            assert_same(found, answers[ratio])
            assert [a.cached for a in found] == [(length - 1) // 128 * 128 * cached for length in LENGTHS]


@pytest.mark.engine
def test_prompts_that_share_a_start(
    served: Any, answers: dict[int, list[Answer]], plain: tuple[list[list[int]], list[Answer]]
) -> None:
    """The uncompressed end of one prompt is not taken for the compressed middle of another, nor the other way around."""
    long, short = plain[0][0], plain[0][0][:520]
    for first, second in ((short, long), (long, short)):
        assert served.reset_prefix_cache()
        alone = ask_all(served, [second], 2)
        assert served.reset_prefix_cache()
        ask_all(served, [first], 2)
        again = ask_all(served, [second], 2)
        # 504 tokens of the short prompt are in groups: three blocks and a part of the fourth.
        assert again[0].cached == 384
        assert_same(again, alone)


@pytest.mark.engine
def test_metrics(served: Any, plain: tuple[list[list[int]], list[Answer]]) -> None:
    assert served.reset_prefix_cache()
    names = "requests_total", "compressed_tokens_total", "saved_operations_total"
    before = [counted(f"sage_variator_{name}") for name in names]
    ask(served, plain[0], [{RATIO: 4}, {RATIO: 4, TAIL: 100}, {RATIO: 2}, {RATIO: 1}, {RATIO: 1}])
    requests, tokens, operations = (
        change(old, counted(f"sage_variator_{name}")) for old, name in zip(before, names, strict=True)
    )
    assert requests == {"4": 2, "2": 1, "1": 2}
    fours = 636 + 200 - 2 * START
    assert tokens == {"4": fours, "2": 64}
    of_plugins = 2 * 256 * (fours * 5 + 64 * 3 + 64 * (2 * fours + fours // 4 + 2 * 64 + 32))
    assert operations == {"": 2 * (2 * 3 * 256 * 768 * (fours * 3 // 4 + 64 // 2) - of_plugins)}


@pytest.mark.engine
def test_load(served: Any, plain: tuple[list[list[int]], list[Answer]]) -> None:
    """With at most four running requests, ratios go up while others wait and down when none do. A request can opt out."""
    prompts, expected = plain
    before = counted("sage_variator_requests_total")
    crowd = [prompts[0][i : i + 200] for i in range(16)]
    together = ask(served, [*crowd, prompts[1]], [*[{}] * 16, {RATIO: 1}], tokens=16)
    seen = change(before, counted("sage_variator_requests_total"))
    assert sum(seen.values()) == 17
    assert seen["4"] >= 4
    assert_same(together[-1:], expected[1:2])
    alone = counted("sage_variator_requests_total")
    for _ in range(3):
        ask(served, [prompts[3]], [{}])
    assert change(alone, counted("sage_variator_requests_total"))["1"] >= 1
    alone = counted("sage_variator_requests_total")
    ask(served, [prompts[3]], [{}])
    assert change(alone, counted("sage_variator_requests_total")) == {"1": 1}


@pytest.mark.engine
def test_cached_prompts_under_load(served: Any, plain: tuple[list[list[int]], list[Answer]]) -> None:
    """What was computed without compression is used under load, too, where it leaves less to compute."""
    prompts, expected = plain
    assert served.reset_prefix_cache()
    ask(served, prompts[:1], [{RATIO: 1}])
    crowd = [prompts[1][i : i + 200] for i in range(16)]
    before = counted("sage_variator_requests_total")
    *_, again = ask(served, [*crowd, prompts[0]], [{}] * 17, tokens=len(expected[0].tokens))
    assert change(before, counted("sage_variator_requests_total"))["4"] >= 4
    assert again.cached == (LENGTHS[0] - 1) // 128 * 128
    assert_same([again], expected[:1])


@pytest.mark.engine
def test_requests_for_what_there_is_not(served: Any, plain: tuple[list[list[int]], list[Answer]]) -> None:
    with pytest.raises(ValueError, match="sage_ratio is 8; this server has 1, 2, 4"):
        ask(served, plain[0][:1], [{RATIO: 8}])


def reference_logprobs(model: Path, plugins: Path, prompts: Sequence[list[int]], ratio: int, cut: int) -> torch.Tensor:
    """Log-probabilities of tokens after the first `cut`, from the training's own pass; with ratio 1, from the plain model."""
    hidden = transformers.AutoConfig.from_pretrained(model).hidden_size
    loaded = {layer: files.load(str(plugins), layer, hidden, [2, 4]) for layer in LAYERS}
    for by_ratio in loaded.values():
        for plugin in by_ratio.values():
            plugin.float()
    attached = train.Attached(transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), loaded)
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        batch = train.Batch(ids, cut, torch.ones(1, len(prompt) - cut, dtype=torch.bool))
        with torch.no_grad(), attached.compressing(ratio, cut):
            logprobs = attached.log_probabilities(attached.hidden(batch))[:-1]
        found.append(logprobs.gather(1, ids[0, cut + 1 :, None])[:, 0])
    return torch.cat(found)


MODELS: dict[str, dict[str, Any]] = {
    "Gemma3Text": {
        "final_logit_softcapping": 20.0,
        "initializer_range": 0.2,
        "sliding_window": 128,
        "query_pre_attn_scalar": 64,
    },
    "Glm4": {"partial_rotary_factor": 0.5},
    "Granite": {"logits_scaling": 0.4, "embedding_multiplier": 2.0, "residual_multiplier": 0.7, "attention_multiplier": 0.1},
    "Llama": {},
    "Mistral": {"sliding_window": None},
    "Phi3": {},
    "Qwen2": {},
    "Qwen3": {},
}


@pytest.mark.engine
@pytest.mark.parametrize("kind", MODELS)
def test_what_is_served_is_what_was_trained(kind: str, tmp_path: Path) -> None:
    """Log-probabilities after a compressed prompt, in the engine and in the pass that plugins are trained with."""
    from vllm import SamplingParams

    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "vocab_size": 512}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "initializer_range": 0.1}
    special = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "max_position_embeddings": 1024}
    model = tmp_path / "model"
    save_random_model(model, getattr(transformers, f"{kind}Config")(**{**sizes, **heads, **special, **MODELS[kind]}))
    path = loud_plugins(tmp_path, model)
    prompts = random_prompts((500, 330))
    options = {"sage": {**OPTIONS, "variator": {"plugins": str(path), "ratio": 4}}}
    scored = {"temperature": 0, "max_tokens": 1, "prompt_logprobs": 0, "flat_logprobs": True, "detokenize": False}
    parameters = [SamplingParams(**scored, extra_args={TAIL: len(prompt) - 256}) for prompt in prompts]
    limits = {"max_model_len": 1024, "max_num_batched_tokens": 200, "skip_tokenizer_init": True}
    with engine(model=model, dtype=EXACT, additional_config=options, **limits) as llm:
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], parameters, use_tqdm=False)
    actual = torch.cat([torch.tensor(output.prompt_logprobs.logprobs)[256:] for output in outputs])
    compressed, plain = (reference_logprobs(model, path, prompts, ratio, 256) for ratio in (4, 1))
    assert (compressed - plain).abs().mean() > 0.2
    bound = 0.2 if EXACT == "float32" else 0.3
    assert (actual - compressed).abs().mean() < bound * (compressed - plain).abs().mean()


@pytest.mark.engine
def test_quality(tmp_path: Path) -> None:
    """The embedded model's plugins at ratio 2: the loss after a compressed prompt, and whether pass keys are found in it."""
    runs = ["SAGE", f"SAGE:variator.plugins={PLUGINS},variator.ratio=2"]
    sizes = ["--tokens", "8192", "--prompt", "1024", "--passkey", "2040", "--out", str(tmp_path / "report")]
    with environment():
        assert quality.main([*runs, *sizes]) == 0
    report = json.loads((tmp_path / "report").read_text())
    plain, pairs = report["runs"]
    assert report["predicted_tokens"] == 4 * (2047 - 1024 - 1)
    assert pairs["loss"] != plain["loss"]
    assert pairs["loss"] < 1.01 * plain["loss"]
    assert pairs["passkey"] == {"2040": 1.0}


@pytest.mark.engine
def test_small_chunks(plugins: Path, answers: dict[int, list[Answer]], plain: tuple[list[list[int]], list[Answer]]) -> None:
    """Chunks of at most 50 tokens, which is a multiple neither of 4 nor of a page, next to decodes."""
    with compressing(plugins, enable_prefix_caching=False, max_num_batched_tokens=50, max_num_seqs=16) as llm:
        for ratio in (2, 4):
            assert_same(ask_all(llm, plain[0], ratio), answers[ratio])


@pytest.mark.engine
def test_preemption(plugins: Path, plain: tuple[list[list[int]], list[Answer]]) -> None:
    """Too few blocks for all requests: some are preempted, and computed again with the ratio that they had."""
    with compressing(plugins, enable_prefix_caching=False, num_gpu_blocks_override=18) as llm:
        prompts = [plain[0][0][:length] for length in (510, 511, 512, 500)]
        asked = [asking(ratio) for ratio in (4, 2, 4, 1)]
        together = ask(llm, prompts, asked, tokens=32)
        assert metric(llm, "vllm:num_preemptions") > 0
        for i in range(4):
            assert_same(together[i : i + 1], ask(llm, prompts[i : i + 1], asked[i : i + 1], tokens=32))


@pytest.mark.engine
def test_compiled_model(plugins: Path, answers: dict[int, list[Answer]], plain: tuple[list[list[int]], list[Answer]]) -> None:
    """With torch.compile, which must not trace into the op, and on a GPU with CUDA graphs, which must not contain it."""
    with compressing(plugins, enforce_eager=False) as llm:
        for ratio in (1, 4):
            assert_same(ask_all(llm, plain[0], ratio), answers[ratio], 0.05)


@pytest.mark.engine
def test_tensor_parallel(plugins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers in processes of their own, each with half of every FFN."""
    with compressing(plugins) as llm:
        prompts = heldout_prompts(llm, LENGTHS)
        expected = ask_all(llm, prompts, 4)
    give_two_workers_cores(monkeypatch)
    with compressing(plugins, tensor_parallel_size=2) as llm:
        assert_same(ask_all(llm, prompts, 4), expected, 0.05)


@pytest.mark.engine
def test_speculative_decoding(
    plugins: Path, answers: dict[int, list[Answer]], plain: tuple[list[list[int]], list[Answer]]
) -> None:
    limits = {"enable_prefix_caching": False, "max_num_batched_tokens": 64, "max_num_seqs": 8}
    with compressing(plugins, speculative_config=NGRAM_DRAFTS, **limits) as llm:
        assert_same(ask_all(llm, plain[0], 4), answers[4])


def test_hashes_of_blocks() -> None:
    """A block's hash contains the ratio and the number of its tokens in groups. Without groups, nothing is added."""
    with environment():
        from vllm.v1.core import kv_cache_utils

        block_hash.apply()

        def keys(reading: CompressionPlan | None, first: int) -> Any:
            request = SimpleNamespace(mm_features=[], lora_request=None, cache_salt="salt", prompt_embeds=None)
            if reading is not None:
                setattr(request, PLAN_KEY, reading)
            return kv_cache_utils.generate_block_hash_extra_keys(request, first, first + 128, 0)[0]

        assert keys(None, 0) == keys(PLAIN, 0) == (("cache_salt", "salt"),)
        assert keys(CompressionPlan(2, 200), 0) == (("cache_salt", "salt"), (PLAN_KEY, f"2:{128 - START}"))
        assert keys(CompressionPlan(4, 200), 128) == ((PLAN_KEY, "4:72"),)
        assert keys(CompressionPlan(2, 200), 256) is None
