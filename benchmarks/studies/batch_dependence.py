#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""How much an answer depends on the batch: log-probabilities of prompts alone and among 16 others, in engines of the embedded
model.

    python3 benchmarks/studies/batch_dependence.py --out benchmarks/results/batch-dependence-NAME.json

Products of matrices may sum in another order when a batch has other rows. That changes the last bits of what attention gets. A
backend that quantizes keys and values rounds some of them to the next code, and later layers see a larger difference.

Without prefix caching, and in one chunk. `prompt` compares each prompt's own tokens. `answer` compares the tokens of greedy
continuations, as long as they are the same; `other_answers` counts the continuations with other tokens.

On a CPU in float32 and bfloat16, which takes a few minutes; on a GPU in float16 and bfloat16.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/, where common/ is
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} | {"VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR")}

from typing import Any

import torch
from common.study import study

from sage_backend import plugin
from sage_backend.demo import HELDOUT, MODEL_DIR
from sage_backend.tools import engines

GPU = torch.cuda.is_available()
RUNS = ("FLASH_ATTN" if GPU else "CPU_ATTN", "SAGE", "SAGE:k_bits=4", "SAGE:k_bits=4,v_bits=4")
OTHERS = 16
LENGTHS = [100 + 25 * i for i in range(OTHERS + 1)]
ANSWER = 32
"""Tokens of a continuation."""

Answer = tuple[list[float], list[int], list[float]]
"""Log-probabilities of a prompt's tokens but the first; the tokens of its continuation, and their log-probabilities."""


def answers(llm: Any, prompts: list[list[int]]) -> list[Answer]:
    from vllm import SamplingParams  # after the environment is set

    params = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True, prompt_logprobs=0, logprobs=0, detokenize=False)
    found = []
    for output in llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False):
        tokens = list(output.outputs[0].token_ids)
        own = [at[token].logprob for at, token in zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True)]
        chosen = [at[token].logprob for at, token in zip(output.outputs[0].logprobs, tokens, strict=True)]
        found.append((own, tokens, chosen))
    return found


def figures(changes: list[float]) -> dict[str, float]:
    """Of absolute changes of log-probabilities, in nats."""
    return {"tokens": len(changes), "largest": round(max(changes), 7), "mean": round(sum(changes) / len(changes), 7)}


def compare(alone: list[Answer], together: list[Answer]) -> dict[str, object]:
    prompt, answer, others = [], [], 0
    for (a_own, a_tokens, a_chosen), (b_own, b_tokens, b_chosen) in zip(alone, together, strict=True):
        prompt += [abs(a - b) for a, b in zip(a_own, b_own, strict=True)]
        same = next((i for i, (a, b) in enumerate(zip(a_tokens, b_tokens, strict=True)) if a != b), ANSWER)
        answer += [abs(a - b) for a, b in zip(a_chosen[:same], b_chosen[:same], strict=True)]
        others += same < ANSWER
    return {"prompt": figures(prompt), "answer": figures(answer), "other_answers": others}


def measure(dtype: str) -> list[dict[str, object]]:
    results: list[dict[str, object]] = []
    limits = {"max_model_len": 2048, "max_num_batched_tokens": 8192, "enable_prefix_caching": False, "enforce_eager": True}
    for run in RUNS:
        arguments = {"dtype": dtype, "kv_cache_memory_bytes": 128 << 20, **limits}
        with engines.engine(engines.Run.parse(run), str(MODEL_DIR), **arguments) as llm:
            ids = llm.get_tokenizer().encode(HELDOUT.read_text(encoding="utf-8"))
            prompts = [ids[i * 2000 : i * 2000 + length] for i, length in enumerate(LENGTHS)]
            together = answers(llm, prompts)
            alone = [answers(llm, [prompt])[0] for prompt in prompts]
        results.append({"run": run, **compare(alone, together)})
    return results


def table(results: list[dict[str, Any]]) -> str:
    lines = [f"{'':<24}" + "".join(f"{name:>18}" for name in ("prompt: largest", "mean", "answer: largest", "mean", "other"))]
    for result in results:
        shown = [result[part][figure] for part in ("prompt", "answer") for figure in ("largest", "mean")]
        lines.append(f"{result['run']:<24}" + "".join(f"{x:>18.1e}" for x in shown) + f"{result['other_answers']:>18}")
    return "\n".join(lines)


if __name__ == "__main__":
    plugin.register()
    circumstances = engines.circumstances("", str(MODEL_DIR))
    study(
        "batch_dependence.py",
        "Measure how much log-probabilities depend on the other requests of a batch.",
        f"changes of log-probabilities, in nats, among {OTHERS} others",
        {dtype: lambda dtype=dtype: measure(dtype) for dtype in ("float16" if GPU else "float32", "bfloat16")},
        table,
        threads=torch.get_num_threads(),
        **{key: circumstances[key] for key in ("device", "versions", "model")},
    )
