#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Prefill on one server and decode on another, with vLLM's NixlConnector between them, and compare the answers.

    pip install nixl
    python3 benchmarks/disaggregation.py SAGE SAGE:k_bits=4,v_bits=4 --out benchmarks/results/disaggregation-NAME.json

For each run, two servers of the embedded model. The first reads a prompt, and the second takes its pages and answers. Then the
first answers the same prompt by itself, which gives the right tokens and log-probabilities. The exit status is 1 if an answer
differs by more than a tie, or if a token of a prompt was not moved.

On GPUs, the first server takes the first ones and the second the last ones, so that they share a GPU where there are too few.
"""

import argparse
import json
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import torch
from common.report import command_line, save
from common.server import Server, counters, free_port, serving

from sage_backend.demo import HELDOUT, MODEL_DIR
from sage_backend.tools.engines import Run, circumstances

PREFILL, DECODE = "kv_producer", "kv_consumer"
KEEP_PAGES = {"do_remote_decode": True, "do_remote_prefill": False}
"""Asks the first server to keep a prompt's pages. Its answer says what the second has to be told."""
ANSWER, CLIENTS = 24, 8
NEAR_TIE = 0.375
"""The largest change of a log-probability that rounding explains in BF16, in nats, as in the tests."""


def complete(server: Server, prompt: str, tokens: int, transfer: dict[str, Any] | None = None) -> dict[str, Any]:
    """A greedy answer of `tokens` tokens, with their log-probabilities."""
    body = {"model": "m", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "logprobs": 0, "ignore_eos": True}
    body |= {"kv_transfer_params": transfer} if transfer else {}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.base}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


def hand_over(first: Server, second: Server, prompt: str, tokens: int) -> dict[str, Any]:
    """The answer of `second`, with the pages of `first`."""
    return complete(second, prompt, tokens, complete(first, prompt, 1, KEEP_PAGES)["kv_transfer_params"])


@contextmanager
def servers(folder: Path, run: Run, ranks: list[int], arguments: list[str]) -> Iterator[tuple[Server, Server]]:
    """The first server and the second, of `ranks` tensor-parallel ranks. Where they fail, their logs are printed."""
    gpus, started = torch.cuda.device_count(), []
    with ExitStack() as stack:
        for role, number in zip((PREFILL, DECODE), ranks, strict=True):
            transfer = {"kv_connector": "NixlConnector", "kv_role": role} | ({} if gpus else {"kv_buffer_device": "cpu"})
            own = ["--load-format", "auto", "--attention-backend", run.backend, "--kv-transfer-config", json.dumps(transfer)]
            own += ["--tensor-parallel-size", str(number), "--additional-config", json.dumps({"sage": run.options})]
            environment = {"VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port())}
            if gpus:
                first = 0 if role == PREFILL else gpus - number
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(first, first + number)))
            started.append(stack.enter_context(serving(folder, [*own, *arguments], 300, f"{role}.log", environment)))
        try:
            yield started[0], started[1]
        except BaseException:
            for server in started:
                print(f"{server.log.name}:\n{server.log.read_text()[-3000:]}", file=sys.stderr)
            raise


def compare(moved: list[dict[str, Any]], own: list[dict[str, Any]]) -> tuple[int, list[float]]:
    """How many answers are the same, and by how much each log-probability changed, up to the first other token and with it: at
    a tie, which may end either way, both servers give their token the same."""
    same, changes = 0, []
    for pair in zip(moved, own, strict=True):
        tokens = zip(*(each["logprobs"]["tokens"] for each in pair), strict=True)
        agreed = list(takewhile(lambda both: both[0] == both[1], tokens))
        values = zip(*(each["logprobs"]["token_logprobs"] for each in pair), strict=True)
        changes += [abs(a - b) for a, b in islice(values, len(agreed) + 1)]
        same += len(agreed) == ANSWER
    return same, changes


def measure(name: str, prompts: list[str], ranks: list[int], arguments: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(CLIENTS) as pool:
        folder = Path(temporary)  # one for both, since servers only exchange pages of the same model
        for file in MODEL_DIR.iterdir():
            (folder / file.name).symlink_to(file)
        with servers(folder, Run.parse(name), ranks, arguments) as (first, second):
            for _ in range(5):  # on a busy machine, the servers' first contact times out
                with suppress(urllib.error.HTTPError):
                    hand_over(first, second, "Hello", 1)
                    break
            before, begun = counters(second.base), time.monotonic()
            moved = list(pool.map(lambda prompt: hand_over(first, second, prompt, ANSWER)["choices"][0], prompts))
            seconds = time.monotonic() - begun
            own = [complete(first, prompt, ANSWER)["choices"][0] for prompt in prompts]
            counted = {name: value - before.get(name, 0.0) for name, value in counters(second.base).items()}
    agreed, changes = compare(moved, own)
    return {
        "run": name,
        "tensor_parallel_ranks": ranks,
        "prompts": len(prompts),
        "same_answers": agreed,
        "largest_change_nats": max(changes),
        "prompt_tokens": counted["vllm:prompt_tokens_total"],
        "moved_tokens": counted["vllm:external_prefix_cache_hits_total"],
        "failed_transfers": counted.get("vllm:nixl_num_failed_transfers_total", 0.0),
        "seconds": seconds,
    }


def _is_wrong(result: dict[str, Any]) -> bool:
    missing = result["moved_tokens"] < result["prompt_tokens"]
    return bool(missing or result["failed_transfers"] or result["largest_change_nats"] > NEAR_TIE)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare answers of two servers that share the work with those of one.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="as for sage eval")
    parser.add_argument("--ranks", nargs=2, type=int, default=[1, 1], metavar="N", help="tensor-parallel ranks of each server")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--characters", type=int, default=1500, help="of a prompt")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    words = sys.argv[1:]
    served = words[words.index("--") + 1 :] if "--" in words else []
    arguments = parser.parse_args(words[: words.index("--")] if "--" in words else words)
    text, size = HELDOUT.read_text(encoding="utf-8"), arguments.characters
    prompts = [text[i * size :][:size] for i in range(arguments.prompts)]
    report = circumstances(command_line("benchmarks/disaggregation.py"), str(MODEL_DIR)) | {"results": []}
    for name in arguments.runs:
        report["results"].append(measure(name, prompts, arguments.ranks, served))
        print(json.dumps(report["results"][-1]), flush=True)
        if arguments.out:
            save(report, arguments.out)
    if any(_is_wrong(each) for each in report["results"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
