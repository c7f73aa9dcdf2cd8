#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Speed of a whole vLLM engine, for any attention backend: prefill, decode steps, and how many tokens its cache holds.

    python3 benchmarks/engine.py FLASH_ATTN FLASH_ATTN/fp8 SAGE SAGE:k_bits=4 \\
        --prefill 8192 32768 131072 --decode 128x1024 64x8192 --out benchmarks/results/engine-NAME.json
    python3 benchmarks/engine.py SAGE:memory.local_tokens=4096 SAGE:memory.host_gib=80 --kv-gib 8 --graphs \\
        --prefill 262144 --decode 1x262144 --out benchmarks/results/host-pages-NAME.json
    P=variator.plugins=random
    python3 benchmarks/engine.py SAGE SAGE:$P,variator.ratio=2 SAGE:$P,variator.ratio=4 \\
        --prefill 8192 --decode 64x8192 --out benchmarks/results/variator-NAME.json

A run is named as for `sage eval`; its compression plugins can also be `random`. Each run gets its own engine in its own
process, with random weights of the given shape (default: Llama-3.1-8B) and random prompts, or, with --model and --text, with a
model's own weights and pieces of a text, which matter where memory chooses pages. Prefill is the time to the first
token of one prompt: the median of --repeat prompts, after a warm-up with the same length or with --warm-up tokens. A decode
step of BATCHxLENGTH is measured with BATCH requests of LENGTH tokens, which are in the prefix cache by then. It is the time of
a longer generation less that of a shorter one, per token; the median of --repeat such differences. With pages in host memory,
`fetched_MiB` is what went over the bus into frames: of a prompt, or of a step. A run that fails is marked with its error, and
the others still run.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common.plugins import fill_in
from common.report import command_line, save
from common.shapes import SHAPES


def execution(arguments: argparse.Namespace) -> dict[str, Any]:
    """How the engine runs its model."""
    if arguments.eager:
        return {"enforce_eager": True}
    compilation: dict[str, Any] = {"cudagraph_capture_sizes": sorted({batch for batch, _ in arguments.decode} | {1})}
    if arguments.graphs:
        compilation |= {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    return {"compilation_config": compilation}


def fetched_bytes(worker: Any) -> int:
    """Bytes that a worker has copied from host pages into frames so far."""
    from sage_backend.engine.host_pages import owners  # in the worker's process

    layers = [impl for impl in owners(worker.vllm_config).values() if impl.cache is not None]
    return sum(int(impl.cache.fetched.sum()) * impl.layout.page_bytes for impl in layers)


def source(arguments: argparse.Namespace, longest: int, folder: str) -> tuple[dict[str, Any], int | list[int]]:
    """What an engine loads, for contexts of up to `longest` tokens, as its arguments; and what prompts are made of: the tokens
    of a text, or the number of different tokens. folder: for the configuration of a shape."""
    if arguments.model is None:
        shape = dict(SHAPES[arguments.shape])
        if arguments.layers:
            shape["num_hidden_layers"] = arguments.layers
        shape["max_position_embeddings"] = max(shape["max_position_embeddings"], longest)
        Path(folder, "config.json").write_text(json.dumps(shape))
        return {"model": folder, "load_format": "dummy"}, shape["vocab_size"]
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(arguments.model)(arguments.text.read_text())["input_ids"]
    if len(tokens) <= longest:
        sys.exit(f"engine.py: {arguments.text} has {len(tokens)} tokens; prompts need more than {longest}")
    return {"model": arguments.model, "hf_overrides": {"max_position_embeddings": longest}}, tokens


class Clock:
    """Times what an engine does with random prompts. vocabulary: see `source`. xargs: of all requests."""

    def __init__(self, llm: Any, vocabulary: int | list[int], xargs: dict[str, Any] | None = None) -> None:
        self.llm, self.vocabulary, self.xargs, self.rng = llm, vocabulary, xargs, random.Random(0)

    def prompts(self, batch: int, length: int) -> list[Any]:
        if isinstance(self.vocabulary, int):
            ids = [[self.rng.randrange(self.vocabulary) for _ in range(length)] for _ in range(batch)]
        else:
            starts = [self.rng.randrange(len(self.vocabulary) - length) for _ in range(batch)]
            ids = [self.vocabulary[start : start + length] for start in starts]
        return [{"prompt_token_ids": each} for each in ids]

    def generate(self, prompts: list[Any], tokens: int) -> float:
        """Seconds that so many tokens of each answer take."""
        from vllm import SamplingParams  # see `main`

        sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True, detokenize=False, extra_args=self.xargs)
        start = time.perf_counter()
        self.llm.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - start

    def fetched(self) -> float:
        """MiB that all workers have fetched."""
        return sum(self.llm.collective_rpc(fetched_bytes)) / 2**20

    def prefill(self, length: int, warm_up: int, repeat: int) -> dict[str, float]:
        """Tokens a second of a prompt, after a warm-up of at most so many tokens."""
        self.generate(self.prompts(1, min(length, warm_up)), 1)
        before = self.fetched()
        seconds = statistics.median(self.generate(self.prompts(1, length), 1) for _ in range(repeat))
        figures: dict[str, float] = {f"prefill_{length}": round(length / seconds)}
        if moved := (self.fetched() - before) / repeat:
            figures[f"prefill_{length}_fetched_MiB"] = round(moved)
        return figures

    def decode(self, batch: int, length: int, repeat: int) -> dict[str, float]:
        """Milliseconds of a decode step of so many requests."""
        asked = self.prompts(batch, length)
        for _ in range(2):  # once to fill the cache, and once to warm up with a full one
            self.generate(asked, 8)
        before = self.fetched()
        seconds = statistics.median(-self.generate(asked, 8) + self.generate(asked, 72) for _ in range(repeat))
        figures = {f"decode_{batch}x{length}_ms": round(seconds / 64 * 1e3, 3)}
        if moved := (self.fetched() - before) / repeat / 80:
            figures[f"decode_{batch}x{length}_fetched_MiB"] = round(moved, 2)
        return figures


def measure(run: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Start an engine and time it; returns the figures."""
    from sage_backend.tools import engines  # see `main`

    longest = max([*arguments.prefill, *(length for _, length in arguments.decode)]) + 1024
    figures: dict[str, Any] = {"run": run}

    def add(found: dict[str, float]) -> None:
        figures.update(found)
        print(f"  {run}: {', '.join(f'{name} {value}' for name, value in found.items())}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        model, vocabulary = source(arguments, longest, folder)
        parsed = engines.Run.parse(run)
        fill_in(parsed, folder)
        began = time.perf_counter()
        with engines.engine(
            parsed,
            **model,
            skip_tokenizer_init=True,
            enable_prefix_caching=True,
            max_model_len=longest,
            max_num_batched_tokens=arguments.chunk,
            kv_cache_memory_bytes=arguments.kv_gib and int(arguments.kv_gib * 2**30),
            **execution(arguments),
            disable_log_stats=True,
        ) as llm:
            figures["start_seconds"] = round(time.perf_counter() - began, 1)
            cache = llm.llm_engine.vllm_config.cache_config
            figures["kv_tokens"] = (cache.num_gpu_blocks or 0) * cache.block_size
            if arguments.skip_prefill_attention:
                from sage_backend.engine import impl  # imports vLLM

                impl.attend_prefill = lambda *_, **__: None
            clock = Clock(llm, vocabulary, arguments.xargs)
            figures["first_request_seconds"] = round(clock.generate(clock.prompts(1, min(200, longest - 1)), 1), 3)
            for length in arguments.prefill:
                add(clock.prefill(length, arguments.warm_up, arguments.repeat))
            for batch, length in arguments.decode:
                add(clock.decode(batch, length, arguments.repeat))
    return figures


def in_process_of_its_own(run: str) -> dict[str, Any]:
    """The figures of a run, or its error. Only the end of a process is sure to free its GPU memory."""
    from sage_backend.tools.engines import error_messages  # see `main`

    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, __file__, *sys.argv[1:], "--only", run, "--out", file.name]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if done.returncode == 0:
            return json.loads(Path(file.name).read_text())
        messages = error_messages(done.stderr)
        return {"run": run, "error": messages[-1] if messages else f"exit code {done.returncode}"}


def table(results: list[dict[str, Any]]) -> str:
    columns = ["run", *sorted({key for result in results for key in result} - {"run"})]
    rows = [columns, *([str(result.get(column, "")) for column in columns] for result in results)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def parse() -> argparse.Namespace:
    def pair(text: str) -> tuple[int, int]:
        batch, length = text.split("x")
        return int(batch), int(length)

    parser = argparse.ArgumentParser(description="Time whole vLLM engines with different attention backends.")
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--model", metavar="FOLDER", help="a model with its weights, instead of a shape; with --text")
    parser.add_argument("--text", type=Path, metavar="FILE", help="what its prompts are made of")
    parser.add_argument("--layers", type=int, help="instead of the shape's own number")
    parser.add_argument("--prefill", type=int, nargs="*", default=[8192, 32768], metavar="TOKENS")
    parser.add_argument("--decode", type=pair, nargs="*", default=[], metavar="BATCHxTOKENS")
    parser.add_argument("--chunk", type=int, default=8192, help="tokens of a prefill chunk (max_num_batched_tokens)")
    parser.add_argument("--kv-gib", type=float, help="GiB of the GPU's memory for pages (default: what vLLM finds free)")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--warm-up", type=int, default=1 << 17, help="most tokens of a warm-up (default: %(default)s)")
    parser.add_argument(
        "--skip-prefill-attention",
        action="store_true",
        help="(SAGE only) skip attention in prefills, to time decode steps after contexts that would take minutes to read; "
        "pages then hold other values than the model's, which does not change the time of a step",
    )
    parser.add_argument("--xargs", type=json.loads, metavar="JSON", help="`vllm_xargs` of all requests")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--eager", action="store_true", help="without torch.compile and CUDA graphs")
    how.add_argument("--graphs", action="store_true", help="without torch.compile, with CUDA graphs for decode steps")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if (arguments.model is None) != (arguments.text is None):
        parser.error("--model and --text go together")
    return arguments


def main() -> None:
    arguments = parse()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # for `fetched_bytes`, which workers are asked for
    if arguments.skip_prefill_attention:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # attention is skipped in this process only
    if arguments.only:
        arguments.out.write_text(json.dumps(measure(arguments.only, arguments)))
        return
    # Not at the top: vLLM reads VLLM_LOGGING_LEVEL when it is imported.
    from sage_backend.tools.engines import Run, circumstances

    for run in arguments.runs:
        try:
            Run.parse(run)
        except ValueError as error:
            sys.exit(f"engine.py: {error}")
    report: dict[str, Any] = circumstances(command_line("benchmarks/engine.py"), arguments.model or arguments.shape)
    report["results"] = []
    for run in arguments.runs:
        print(run, flush=True)
        report["results"].append(in_process_of_its_own(run))
        if arguments.out:  # after each run: the next one may be interrupted
            save(report, arguments.out)
    print(table(report["results"]))
    if any("error" in result for result in report["results"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
