#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Let two engines serve the same clients, one with pages in host memory and one with all pages on the GPU; compare all answers.

    python3 benchmarks/host_pages.py --seconds 300 --out benchmarks/results/host-pages-clients-NAME.json

Every client has one request at a time. Most prompts begin with one of a few long texts, which the prefix cache holds, and some
requests are aborted. There are too few pages for all, so that requests preempt each other. What a client asks depends on its
number and turn only, every answer has a fixed number of tokens, and the next request comes in the step after. So both engines
take the same steps, and their answers can be compared token by token. At the end, all pages of the pool must be free, and every
frame must hold what its page holds. The exit status is 1 if a check fails.

On a CPU, both engines compute the same bits. On a GPU, the attention of a step is cut into other parts, which rounds otherwise:
there, an answer may differ from a token on whose two likeliest are nearly equally likely. --tie says how nearly.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

from common.report import command_line, save

from sage_backend.demo import HELDOUT, MODEL_DIR
from sage_backend.tools import engines

ABORTED = 0.15
"""The share of requests that are aborted, if they last long enough."""
SHARED = (3000, 1500, 700)
"""The tokens of the texts with which three of four prompts begin."""
PROMPTS = (60, 125, 250, 500, 1000, 2000)
"""The tokens behind them."""
ANSWERS = (4, 16, 48)
LONGEST = SHARED[0] + PROMPTS[-1] + ANSWERS[-1]


@dataclass(frozen=True)
class Request:
    """prompt: token ids; tokens: of the answer; leaves: the steps after which it is aborted, if its answer is not finished."""

    prompt: list[int]
    tokens: int
    leaves: int | None


def request(text: Sequence[int], client: int, turn: int) -> Request:
    """What a client asks on its turn, made of the tokens of a text."""
    random = Random(f"{client} {turn}")
    length, start = random.choice(PROMPTS), random.randrange(len(text) - PROMPTS[-1])
    shared = random.choice((*SHARED, 0))
    leaves = random.randrange(1, 2 * ANSWERS[1]) if random.random() < ABORTED else None
    return Request([*text[shared : 2 * shared], *text[start : start + length]], random.choice(ANSWERS), leaves)


@dataclass(frozen=True)
class Answer:
    """tokens, logprobs: those of the answer; margins: how far each token was above the next likeliest, in nats; cached: tokens
    of the prompt that came from the prefix cache; step: the one that finished it."""

    tokens: list[int]
    logprobs: list[float]
    margins: list[float]
    cached: int
    step: int


@dataclass
class Played:
    """What an engine did. answers: by client and turn; until: the step from which on nothing was asked; lost: pages of the pool
    that are not free at the end; damage: what is wrong with frames; fetched: pages of a KV head of a layer."""

    answers: dict[tuple[int, int], Answer]
    steps: int
    until: int
    seconds: float
    aborted: int
    preemptions: int
    lost: int
    damage: str
    fetched: int


def serve(llm: Any, text: Sequence[int], clients: int, seconds: float) -> Played:
    """Serve the clients for that long, and then those requests that are not finished."""
    from vllm import SamplingParams

    engine, answers, step, until, aborted = llm.llm_engine, {}, 0, 0, 0
    turns, leaving = [0] * clients, [(0, "")] * clients
    begun = time.monotonic()

    def ask(client: int) -> None:
        asked = request(text, client, turns[client])
        name = f"{client} {turns[client]}"
        params = SamplingParams(temperature=0, max_tokens=asked.tokens, ignore_eos=True, logprobs=2, detokenize=False)
        engine.add_request(name, {"prompt_token_ids": asked.prompt}, params)
        leaving[client] = (-1 if asked.leaves is None else step + asked.leaves, name)
        turns[client] += 1

    idle = set(range(clients))
    while idle or engine.has_unfinished_requests():
        for client in sorted(idle):
            ask(client)
        idle = set()
        for output in engine.step():
            if output.finished:
                client, turn = map(int, output.request_id.split())
                answers[client, turn] = _answer(output, step)
                leaving[client] = (-1, "")
                idle.add(client)
        for client, (leaves, name) in enumerate(leaving):
            if leaves == step:
                engine.abort_request([name])
                leaving[client] = (-1, "")
                aborted += 1
                idle.add(client)
        step += 1
        if time.monotonic() - begun < seconds:
            until = step
        else:
            idle = set()
    return Played(answers, step, until, time.monotonic() - begun, aborted, *_state(llm))


def _answer(output: Any, step: int) -> Answer:
    [only] = output.outputs
    ids = list(only.token_ids)
    best = [sorted((each.logprob for each in at.values()), reverse=True) for at in only.logprobs]
    logprobs = [at[token].logprob for token, at in zip(ids, only.logprobs, strict=True)]
    return Answer(ids, logprobs, [first - second for first, second, *_ in best], output.num_cached_tokens, step)


def _state(llm: Any) -> tuple[int, int, str, int]:
    """preemptions, lost, damage and fetched of `Played`."""
    from sage_backend.engine import host_pages

    engine = llm.llm_engine
    config, scheduler = engine.vllm_config, engine.engine_core.engine_core.scheduler
    preemptions = sum(int(metric.value) for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")
    kept = 1  # by vLLM
    lost = config.cache_config.num_gpu_blocks - kept - scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    held = [impl.cache for impl in host_pages.owners(config).values() if impl.cache is not None]
    return preemptions, lost, host_pages.damage(config), sum(int(cache.fetched.sum()) for cache in held)


def play(run: str, model: str, arguments: Mapping[str, Any], clients: int, seconds: float, told: Connection) -> None:
    """In a process of its own: start an engine, send the number of its pages, and then what it did."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # steps are taken here
    limits = {"max_model_len": LONGEST, **engines.stretched(model, LONGEST)}
    with engines.engine(engines.Run.parse(run), model, **limits, **arguments) as llm:
        told.send(llm.llm_engine.vllm_config.cache_config.num_gpu_blocks)
        text = llm.get_tokenizer().encode(HELDOUT.read_text(encoding="utf-8"))
        told.send(serve(llm, text, clients, seconds))


def play_both(arguments: argparse.Namespace) -> Iterator[Played]:
    """What an engine with host pages did, and what one with as many pages on the GPU did, both at the same time."""
    shared: dict[str, Any] = {"dtype": arguments.dtype, "disable_log_stats": False}
    shared |= {"max_num_seqs": arguments.clients, "max_num_batched_tokens": 2048, "gpu_memory_utilization": 0.4}
    if arguments.graphs:
        shared["compilation_config"] = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    else:
        shared["enforce_eager"] = True
    context, pages, started = get_context("spawn"), None, []
    for run in (f"{arguments.run},memory.host_gib={arguments.host_gib}", arguments.run):
        own = {"kv_cache_memory_bytes": int((arguments.kv_gib if pages is None else 2 * arguments.host_gib) * 2**30)}
        if pages is not None:
            own["num_gpu_blocks_override"] = pages
        here, there = context.Pipe()
        process = context.Process(
            target=play, args=(run, arguments.model, shared | own, arguments.clients, arguments.seconds, there)
        )
        process.start()
        there.close()
        pages = here.recv()  # EOFError if it did not start
        started.append((process, here))
    for process, here in started:
        yield here.recv()
        process.join()


def compare(hosted: Played, whole: Played, tie: float) -> dict[str, Any]:
    """The figures of both, and the checks. A request counts if both engines finished it while they had new ones."""
    until = min(hosted.until, whole.until)
    both = [{key: a for key, a in played.answers.items() if a.step < until} for played in (hosted, whole)]
    common = sorted(both[0].keys() & both[1].keys())
    other, moved, margin = 0, 0.0, 0.0
    for key in common:
        a, b = both[0][key], both[1][key]
        same = next((i for i, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=True)) if x != y), len(a.tokens))
        moved = max([moved, *(abs(x - y) for x, y in zip(a.logprobs[:same], b.logprobs[:same], strict=True))])
        if same < len(a.tokens):
            other += 1
            margin = max(margin, a.margins[same], b.margins[same])
    names = ("host pages", "all on the GPU")
    figures = [{k: v for k, v in asdict(played).items() if k != "answers"} for played in (hosted, whole)]
    return {
        **dict(zip(names, figures, strict=True)),
        "answers": len(common),
        "answers with pages from the prefix cache": sum(both[0][key].cached > 0 for key in common),
        "answers with other tokens": other,
        "largest margin where tokens differ": margin,
        "largest change of a log-probability before": moved,
        "verdicts": {
            "answers were compared": len(common) > len(hosted.answers) // 2,
            "the same steps": all(both[0][key].step == both[1][key].step for key in common),
            "the same requests": both[0].keys() == both[1].keys(),
            "the same pages from the prefix cache": all(both[0][key].cached == both[1][key].cached for key in common),
            "the same tokens": margin <= tie,
            "requests were aborted and preempted": min(hosted.aborted, hosted.preemptions) > 0,
            "all pages returned": hosted.lost == whole.lost == 0,
            "frames hold what their pages hold": not hosted.damage,
            "pages were fetched": hosted.fetched > 0,
        },
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare an engine with pages in host memory to one without, under load.")
    parser.add_argument("--run", default="SAGE:memory.local_tokens=1024,memory.topk_pages=16,memory.extrapolate=2048")
    parser.add_argument("--model", default=str(MODEL_DIR))
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--host-gib", type=float, default=0.125, help="pages of both engines")
    parser.add_argument("--kv-gib", type=float, default=0.0625, help="of the GPU, for the engine with host pages")
    parser.add_argument("--graphs", action="store_true", help="decode in CUDA graphs")
    parser.add_argument("--dtype", default="auto", help="of the model")
    parser.add_argument("--tie", type=float, default=0.0, help="nats up to which two tokens are equally likely")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    report = compare(*play_both(arguments), arguments.tie)
    facts = engines.circumstances(command_line("benchmarks/host_pages.py", argv), arguments.model)
    report = facts | {"clients": arguments.clients} | report
    print(json.dumps(report, indent=1))
    if arguments.out:
        save(report, arguments.out)
    return int(not all(report["verdicts"].values()))


if __name__ == "__main__":
    sys.exit(main())
