# SPDX-License-Identifier: Apache-2.0
"""Engines for the tests: `vllm.LLM` in this process, so that vLLM is imported once, not three times per engine."""

import gc
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from types import BuiltinFunctionType
from typing import Any
from unittest import mock

import forked
import pytest
import torch
import torch.nn.functional as F

from sage_backend.demo import HELDOUT, MODEL_DIR
from sage_backend.engine import start_calibration
from sage_backend.tools import engines as runner

PLAIN = "FLASH_ATTN" if torch.cuda.is_available() else "CPU_ATTN"
"""vLLM's own backend, to compare with."""

EXACT = "bfloat16" if torch.cuda.is_available() else "float32"
"""The dtype of models where it does not matter: on a CPU the one that rounds least, and is fast on all of them."""

ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}

NGRAM_DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
"""A `speculative_config` that takes drafts from the prompt."""

WARMED_UP: dict[str, Any] = {"enforce_eager": False, "compilation_config": {"mode": 2, "backend": "eager"}}
"""For pipeline parallelism: vLLM's CPU runner allocates buffers for what the first half of the layers sends during its warm-up,
and it warms up only compiled models. In this mode (DYNAMO_TRACE_ONCE) and with this backend of torch.compile, nothing is
actually compiled."""

NEAR_TIE = 0.375
"""In nats: three steps of a BF16 logit above 16. Margins of an eager and a compiled engine differed by up to 0.31."""

NOISE = NEAR_TIE if torch.cuda.is_available() else 0.02
"""Bound on the change of a token's log-probability by the other requests of a batch, in nats."""


@contextmanager
def environment() -> Iterator[None]:
    """The environment of engines: vLLM in one process, without Triton's interpreter and without the user's settings."""
    _keep_cpu_kernels()  # here, too: an engine of a fixture lives on while a test starts another
    with mock.patch.dict(os.environ, ENVIRONMENT):
        for name in ("TRITON_INTERPRET", "VLLM_CPU_KVCACHE_SPACE"):
            os.environ.pop(name, None)
        import uncompiled  # noqa: F401

        # For every new kind of model, vLLM would start a process just to inspect its class.
        inspecting = mock.patch("vllm.model_executor.models.registry._run_in_subprocess", lambda inspect: inspect())
        with inspecting, _fast_products(), _short_collections(), _forked_workers():
            yield
    _keep_cpu_kernels()


def _fast_products() -> AbstractContextManager[Any]:
    """Have linear layers in 16 bits compute in float32, on CPUs that have no instructions for 16 bits (those without AVX-512).
    There, torch takes 25 times as long for BF16. It sums in float32, too."""
    plain = F.linear

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if x.dtype not in (torch.bfloat16, torch.float16):
            return plain(x, weight, bias)
        return plain(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)

    slow = not torch.cuda.is_available() and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return mock.patch("torch.nn.functional.linear", linear) if slow else nullcontext()


def _forked_workers() -> AbstractContextManager[Any]:
    """Have vLLM's CPU executor fork the workers of engines with several from a process that has imported vLLM."""
    if torch.cuda.is_available():
        return nullcontext()
    context = partial(forked.context, ENVIRONMENT, _fast_products)
    return mock.patch("vllm.v1.executor.multiproc_executor.get_mp_context", context)


@contextmanager
def _short_collections() -> Iterator[None]:
    """Take what there is before out of garbage collections.

    For each engine, vLLM makes nine full ones. Of the 700,000 objects that the imports alone leave, each would take half a
    second. Its own `gc.freeze` would keep the engine's objects, too, and its `gc.unfreeze` bring back all others.
    """
    if not isinstance(gc.freeze, BuiltinFunctionType):  # within another environment: its objects must stay collectable
        yield
        return
    from vllm import LLM  # noqa: F401  # what it imports shall be frozen, too

    gc.collect()
    gc.freeze()
    with mock.patch.multiple(gc, freeze=lambda: None, unfreeze=lambda: None):
        yield


def _keep_cpu_kernels() -> None:
    """Stop later engines of this process from replacing vLLM's Triton kernels, which the first one has done.

    vLLM 0.32 scans every imported module for them, and fails at llvmlite, which n-gram drafts import.
    """
    dispatcher = sys.modules.get("vllm.triton_utils.dispatcher")
    if dispatcher is not None and dispatcher._registry:
        from vllm.platforms import current_platform

        current_platform.register_triton_kernel_overrides = lambda: None


@contextmanager
def engine(run: str = "SAGE", model: Path = MODEL_DIR, **arguments: Any) -> Iterator[Any]:
    """An engine for `run` (as `sage eval` names it): small, eager and with metrics, unless arguments say otherwise."""
    defaults = {
        "enforce_eager": True,
        "max_model_len": 2048,
        "kv_cache_memory_bytes": 64 << 20,
        "disable_log_stats": False,
    }
    arguments = {**defaults, **arguments}
    started = runner.engine(runner.Run.parse(run), str(model), **arguments)
    with environment(), _few_tokens_to_calibrate(arguments), started as llm:
        yield llm


def _few_tokens_to_calibrate(arguments: dict[str, Any]) -> AbstractContextManager[Any]:
    """At the start of an engine without a tokenizer, whose weights are random: any tokens make the same statistics."""
    return mock.patch.object(start_calibration, "MAX_TOKENS", 64) if arguments.get("skip_tokenizer_init") else nullcontext()


def inspect_embedded_model() -> Path:
    """Have vLLM inspect the class of the embedded model and cache what it finds, for which every process without a cache would
    start another one and import vLLM there. Returns the folder in VLLM_CACHE_ROOT."""
    with environment():
        from vllm.model_executor.models.registry import ModelRegistry

        ModelRegistry.models["LlamaForCausalLM"].inspect_model_cls()
    return Path(os.environ["VLLM_CACHE_ROOT"], "modelinfos")


def logged(caplog: pytest.LogCaptureFixture, part: str) -> list[str]:
    """The logged messages with this text in them."""
    return [message for message in caplog.messages if part in message]


def metric(llm: Any, name: str) -> float:
    """The value of vLLM's counter `name` since the engine's start."""
    return sum(metric.value for metric in llm.get_metrics() if metric.name == name)


def capacity(llm: Any) -> int:
    """Tokens that the engine says its KV cache holds."""
    [info] = [metric for metric in llm.get_metrics() if metric.name == "vllm:cache_config_info"]
    return int(info.labels["num_gpu_blocks"]) * int(info.labels["block_size"])


@dataclass(frozen=True)
class Answer:
    """A greedy continuation. margins: how far the chosen token was above the next likeliest, in nats."""

    tokens: list[int]
    margins: list[float]
    cached: int
    """Prompt tokens that came from the prefix cache."""
    logprobs: Sequence[float] = ()
    """Of the tokens."""


def greedy(
    llm: Any, prompts: Sequence[list[int]], tokens: int = 32, together: bool = True, read_cache: bool = True,
    extra_args: Sequence[dict[str, Any] | None] = (), adapters: Sequence[Any] = (),
) -> list[Answer]:  # fmt: skip
    """Continue the prompts (token ids) by `tokens` tokens, as one batch or one after another. read_cache: whether their pages
    may come from the prefix cache. extra_args, adapters: of each prompt's request, if any has some; an adapter is vLLM's
    LoRARequest or None."""
    from vllm import SamplingParams

    same: dict[str, Any] = {"temperature": 0, "max_tokens": tokens, "ignore_eos": True, "logprobs": 2, "detokenize": False}
    same["skip_reading_prefix_cache"] = not read_cache
    params = [SamplingParams(**same, extra_args=extra) for extra in extra_args or [None] * len(prompts)]
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    requests = list(zip(inputs, params, adapters or [None] * len(prompts), strict=True))
    answers = []
    for batch in [requests] if together else [[request] for request in requests]:
        batched, of_each, adapted = map(list, zip(*batch, strict=True))
        for output in llm.generate(batched, of_each, use_tqdm=False, lora_request=adapted):
            best = [sorted((each.logprob for each in at.values()), reverse=True) for at in output.outputs[0].logprobs]
            margins = [first - second for first, second, *_ in best]
            ids = list(output.outputs[0].token_ids)
            logprobs = [at[token].logprob for token, at in zip(ids, output.outputs[0].logprobs, strict=True)]
            answers.append(Answer(ids, margins, output.num_cached_tokens, logprobs))
    return answers


def heldout_prompts(llm: Any, lengths: Sequence[int]) -> list[list[int]]:
    """Prompts of these lengths, each from another part of the held-out text."""
    ids = llm.get_tokenizer().encode(HELDOUT.read_text(encoding="utf-8"))
    return [ids[i * 2000 : i * 2000 + length] for i, length in enumerate(lengths)]


def random_prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Prompts of these lengths for a model with 512 tokens, all but the first of them drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 512, (length,), generator=generator).tolist() for length in lengths]


def assert_same_tokens(actual: Sequence[Answer], expected: Sequence[Answer], near_tie: float = 0.0) -> None:
    """Assert that the tokens are the same. A request may differ from a token on where its margin is at most `near_tie`.

    The 16-bit matrix products of the model's own layers round differently for batches of different sizes, which decides near
    ties. vLLM's own backends differ there too. In float32 this matters least.
    """
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        where = next((j for j, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=True)) if x != y), None)
        if where is not None:
            margin = max(a.margins[where], b.margins[where])
            assert margin <= near_tie, f"request {i} differs from token {where} on, where the margin is {margin:.3f} nats"


def assert_same_answers(actual: Sequence[Answer], expected: Sequence[Answer], noise: float = NOISE) -> None:
    """Assert that the tokens are the same, and their log-probabilities nearly. A request may differ from a token on that is
    hardly likelier than another one."""
    assert_same_tokens(actual, expected, 2 * noise)
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        for j, change in enumerate(changes(a, b)):
            assert change <= noise, f"request {i}, token {j}: its log-probability changes by {change:.3f}"


def changes(a: Answer, b: Answer) -> list[float]:
    """The changes of the log-probabilities of the tokens that two answers begin with, in nats."""
    pairs = zip(a.tokens, b.tokens, a.logprobs, b.logprobs, strict=True)
    return [abs(x - y) for _, _, x, y in takewhile(lambda pair: pair[0] == pair[1], pairs)]


def prompt_logprobs(llm: Any, prompts: Sequence[list[int]]) -> torch.Tensor:
    """The log-probability of every prompt token but the first, of all prompts in a row."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, flat_logprobs=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    return torch.cat([torch.tensor(output.prompt_logprobs.logprobs) for output in outputs])


def save_random_model(folder: Path, config: Any) -> None:
    """Make a checkpoint of `config` (from transformers) with random weights, large enough for attention to matter."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.fill_(4.0)  # as much weight as many keys
            elif name.endswith("q_norm.weight") and config.model_type == "gemma4_text":
                parameter.fill_(0.2)  # this model does not scale its logits: as large as those of the others
    model.save_pretrained(folder)


def give_two_workers_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each of an engine's two workers a core. Skips the test without two cores, or, on a GPU, without two GPUs."""
    if torch.cuda.is_available():
        if torch.cuda.device_count() < 2:
            pytest.skip("needs two GPUs")
    else:
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) < 2:
            pytest.skip("needs two cores")
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[1]}")
