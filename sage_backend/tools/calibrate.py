# SPDX-License-Identifier: Apache-2.0
"""Calibration on a text of the user's: `sage calibrate MODEL --out FILE`.

An engine that starts without such a file calibrates its keys on short texts of its own (`engine.start_calibration`). A file has
more: it knows the user's text, layers whose values have a large enough mean get an anchor of values, and the precision of keys
and values can be chosen per layer.

With `--k-bits auto` or `--v-bits auto`, each layer's attention is computed with every kind of page, and a layer gets the
smallest whose error is within the budget: the adaptive quantization of SageAttention (Zhang et al., ICLR 2025, section 4), with
the relative L2 error of attention's output in place of its cosine similarity. vLLM keeps pages of several sizes in one pool
without waste, as long as all layers attend to all tokens.
"""

import argparse
import itertools
import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from sage_backend.demo import HELDOUT
from sage_backend.features.calibration import begin_prompt, calibrations, kv_heads, log_reasons, observe, statistics, tensors_of
from sage_backend.features.calibration_file import OF_EQUALIZER, OF_VALUES, LayerBits, save
from sage_backend.features.layers import own_impls
from sage_backend.features.observers import PageErrors
from sage_backend.tools.command import check_out, run_command
from sage_backend.tools.engines import Run, engine
from sage_backend.tools.models import check_model
from sage_backend.tools.text import read_text, windows
from sage_paged import K_BITS, V_BITS

Format = tuple[int, int]
"""Bits of keys and of values."""


def _can_differ(worker: Any) -> bool:
    """Whether layers can have pages of different sizes without waste, which takes layers that keep the same tokens."""
    # This and the other imports of vLLM in functions: it reads VLLM_LOGGING_LEVEL, which `main` sets, when it is imported.
    from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

    return UniformTypeKVCacheSpecs.is_uniform_type(worker.get_kv_cache_spec())


def _measure_errors(worker: Any, tensors: dict[str, torch.Tensor], formats: list[Format]) -> None:
    """Measure the errors of pages with this calibration from now on. The engine's own pages keep theirs."""
    impls = own_impls(worker.vllm_config)
    for name, found in calibrations(worker, tensors).items():
        impls[name].observer = PageErrors(impls[name], found.to(worker.device), formats) if name in tensors else None


def _squares(worker: Any) -> dict[str, dict[Any, float]]:
    return {name: impl.observer.squares for name, impl in own_impls(worker.vllm_config).items() if impl.observer is not None}


@dataclass(frozen=True)
class Calibration:
    """model_config: vLLM's ModelConfig. tensors: by the names of the file. errors: the relative L2 error of attention's output,
    by layer and format, from the fewest bytes to the most; empty if it was not measured."""

    model_config: Any
    tensors: dict[str, torch.Tensor]
    errors: dict[str, dict[Format, float]]

    def choose(self, budget: float) -> dict[str, Format]:
        """For each layer, the format of the fewest bytes with an error within the budget. Raises ValueError if a layer has
        none."""
        chosen = {}
        for layer, errors in self.errors.items():
            within = [pages for pages, error in errors.items() if error <= budget]
            if not within:
                least = min(errors.values())
                raise ValueError(f"--budget {budget} cannot be met: the error of {layer} is at least {least:.4f}")
            chosen[layer] = within[0]
        return chosen


def calibrate(
    model: str, text: str, tokens: int, context: int, formats: Sequence[Format] = (), **arguments: Any
) -> Calibration:
    """Run a model on the first `tokens` tokens of a text in windows of `context`, and again to measure the errors of pages of
    `formats`, if there are any.

    Each window starts with the tokenizer's special tokens. arguments: for the engine. Raises ValueError for a text without
    tokens, and for errors of layers that need equal pages.
    """
    from vllm import SamplingParams

    fixed = {"enforce_eager": True, "enable_prefix_caching": False, "max_model_len": context}
    if formats:
        fixed["max_num_batched_tokens"] = max(context, 2048)  # for prompts that come whole
    once = SamplingParams(max_tokens=1, temperature=0, detokenize=False)
    with engine(Run.parse("SAGE"), model, **fixed, **arguments) as llm:
        config = llm.llm_engine.vllm_config.model_config
        prompts: list[Any] = [{"prompt_token_ids": each} for each in windows(llm.get_tokenizer(), text, tokens, context)]
        if not prompts:
            raise ValueError("the text is empty")
        if formats and not all(llm.collective_rpc(_can_differ)):
            raise ValueError(
                "--k-bits auto and --v-bits auto are for models whose layers all attend to all tokens: elsewhere, vLLM gives "
                "every layer as many bytes as the largest"
            )
        log_reasons(llm.collective_rpc(observe))
        for prompt in tqdm(prompts, "statistics of layers"):
            llm.collective_rpc(begin_prompt)
            llm.generate([prompt], once, use_tqdm=False)
        found = tensors_of(llm.collective_rpc(statistics), llm.collective_rpc(kv_heads))
        if not formats:
            return Calibration(config, found, {})
        formats = sorted(formats, key=lambda pages: (sum(pages), pages[1]))  # by bytes
        llm.collective_rpc(_measure_errors, args=(found, formats))
        for prompt in tqdm(prompts, "errors of pages"):
            llm.generate([prompt], once, use_tqdm=False)
        squares = llm.collective_rpc(_squares)
    errors = {}
    for name in {name: None for worker in squares for name in worker}:
        total = {kind: sum(worker[name][kind] for worker in squares if name in worker) for kind in (*formats, "exact")}
        errors[name] = {pages: (total[pages] / total["exact"]) ** 0.5 for pages in formats}
    return Calibration(config, found, errors)


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit status. Errors in the input go to stderr, in one line."""
    description = "Calibrate a model's keys and values, and their precision, on a text."
    parser = argparse.ArgumentParser(prog="sage calibrate", description=description)
    parser.add_argument("model", help="folder or name")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="where to write the calibration")
    parser.add_argument("--text", type=Path, default=HELDOUT, help="text to calibrate on (default: the embedded held-out text)")
    parser.add_argument("--tokens", type=int, default=1 << 15, help="how many of its tokens (default: %(default)s)")
    window = "tokens that are read together, with a beginning-of-text token first if the tokenizer adds one"
    parser.add_argument("--context", type=int, default=2048, help=f"{window} (default: %(default)s)")
    parser.add_argument("--k-bits", choices=["auto"], help="choose the bits of each layer's keys, within --budget")
    parser.add_argument("--v-bits", choices=["auto"], help="choose the bits of each layer's values, within --budget")
    parser.add_argument(
        "--budget", type=float, metavar="X", help="largest relative L2 error of a layer's attention, for example 0.1"
    )
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    arguments = parser.parse_args(argv)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # workers hold the statistics and errors
    return run_command(lambda: _run(arguments))


def _name(k_bits: int, v_bits: int, chooses: list[str]) -> str:
    """The words for a format, as far as it is chosen."""
    words = {"k_bits": f"K INT{k_bits}", "v_bits": "V e4m3" if v_bits == 8 else "V 4 bits"}
    return " ".join(words[option] for option in chooses)


def _run(arguments: argparse.Namespace) -> None:
    text = read_text(arguments.text)
    if arguments.tokens < 1 or arguments.context < 2:
        raise ValueError("--tokens must be at least 1 and --context at least 2")
    check_out(arguments.out)
    chooses = [option for option in ("k_bits", "v_bits") if getattr(arguments, option)]
    if bool(chooses) != (arguments.budget is not None):
        raise ValueError("--budget goes with --k-bits auto, --v-bits auto, or both")
    if arguments.budget is not None and not arguments.budget > 0:
        raise ValueError("--budget must be above 0")
    check_model(arguments.model)
    from vllm.platforms import current_platform

    cache_limits = {"kv_cache_memory_bytes": 1 << 30} if current_platform.is_cpu() else {}
    formats = list(itertools.product(K_BITS if arguments.k_bits else (8,), V_BITS if arguments.v_bits else (8,)))
    found = calibrate(
        arguments.model, text, arguments.tokens, arguments.context, formats if chooses else (),
        tensor_parallel_size=arguments.tensor_parallel_size, **cache_limits,
    )  # fmt: skip
    chosen = found.choose(arguments.budget) if found.errors else {}
    bits: dict[str, LayerBits] = {}
    for layer, (k_bits, v_bits) in chosen.items():
        bits[layer] = {option: each for option, each in (("k_bits", k_bits), ("v_bits", v_bits)) if option in chooses}
        measured = ", ".join(f"{_name(*each, chooses)} {error:.4f}" for each, error in reversed(found.errors[layer].items()))
        print(f"{layer}: {_name(k_bits, v_bits, chooses)} (errors: {measured})")
    save(arguments.out, found.tensors, found.model_config, bits)
    option = json.dumps({"sage": {"calibration": str(arguments.out)}})
    keys, values = (sum(name.endswith(kind) for name in found.tensors) for kind in (OF_EQUALIZER, OF_VALUES))
    layers = f"{keys} layers, {values} of which have an anchor of values"
    print(f"{arguments.out}: {layers}. Serve with --additional-config {shlex.quote(option)}")
