# SPDX-License-Identifier: Apache-2.0
"""Offline calibration: per-layer key and value means and, optionally, key precision. `sage calibrate MODEL --out FILE`.

Without a calibration, the first tokens that a server stores fix the anchors (`sage_kernels.reference.fix_anchor`). A
calibration takes the mean keys of a whole text. They are the same for every process that loads the file, so pages may leave the
process, and they are closer to keys in the middle and at the end of a prompt, which have been rotated further. Layers whose
values have a large enough mean (`MIN_MEAN_FRACTION`) get an anchor of values as well, which first tokens never fix.

With `--k-bits auto`, each layer's attention is computed with every kind of page, and a layer gets the smallest whose error is
within the budget: the adaptive quantization of SageAttention (Zhang et al., ICLR 2025, section 4), with the relative L2 error
of attention's output in place of its cosine similarity. vLLM keeps pages of both sizes in one pool without waste, as long as
all layers attend to all tokens.
"""

import argparse
import json
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from sage_backend.demo import HELDOUT
from sage_backend.features.calibration_file import OF_VALUES, save, worker_anchors
from sage_backend.features.layers import own_impls
from sage_backend.features.observers import Means, PageErrors
from sage_backend.tools.command import run_command
from sage_backend.tools.engines import Run, engine
from sage_backend.tools.models import check_model
from sage_backend.tools.text import read_text, windows
from sage_paged import K_BITS

MIN_MEAN_FRACTION = 0.05
"""An anchor of values is kept if it reduces their mean square by more than this fraction. Errors of e4m3 are proportional to
the values, so V's errors fall by 2.5% and attention's, at most half of which come from V, by 1%. A smaller gain is not worth
another pass over every output."""


def _anchors_of(means: list[dict[str, torch.Tensor]], heads: int) -> dict[str, torch.Tensor]:
    """The anchors of a model with `heads` KV heads, by the names of the file. means: results of `Means` by layer, one dict a
    worker."""
    found = {}
    for layer in {layer: None for worker in means for layer in worker}:
        by_head = torch.cat([worker[layer] for worker in means if layer in worker])
        by_head = by_head[:: max(1, len(by_head) // heads)]  # workers beyond the number of heads repeat one
        key, value, square = (mean.clone() for mean in by_head.unbind(1))
        found[layer] = key
        if value.square().sum() > MIN_MEAN_FRACTION * square.sum():
            found[layer + OF_VALUES] = value
    return found


def _can_differ(worker: Any) -> bool:
    """Whether layers can have pages of different sizes without waste, which takes layers that keep the same tokens."""
    # This and the other imports of vLLM in functions: it reads VLLM_LOGGING_LEVEL, which `main` sets, when it is imported.
    from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

    return UniformTypeKVCacheSpecs.is_uniform_type(worker.get_kv_cache_spec())


def _observe(worker: Any) -> None:
    for impl in own_impls(worker.vllm_config).values():
        impl.observer = Means()


@torch.inference_mode()  # in which anchors were allocated
def _measure_errors(worker: Any, anchors: dict[str, torch.Tensor]) -> None:
    """Measure the errors of pages from now on, with these anchors."""
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

    rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    for name, impl in own_impls(worker.vllm_config).items():
        impl.observer = None
        key, value = worker_anchors(anchors, name, impl.num_kv_heads, rank, ranks)
        if key is not None:
            impl.anchor.copy_(key)
            impl.v_anchor = None if value is None else value.to(impl.anchor.device)
            impl.observer = PageErrors(impl)


def _squares(worker: Any) -> dict[str, dict[Any, float]]:
    return {name: impl.observer.squares for name, impl in own_impls(worker.vllm_config).items() if impl.observer is not None}


def _means(worker: Any) -> dict[str, torch.Tensor]:
    means = {name: impl.observer.result() for name, impl in own_impls(worker.vllm_config).items()}
    return {name: mean for name, mean in means.items() if mean is not None}


@dataclass(frozen=True)
class Calibration:
    """model_config: vLLM's ModelConfig. anchors: by the names of the file. errors: the relative L2 error of attention's output,
    by layer and by bits of keys; empty if it was not measured."""

    model_config: Any
    anchors: dict[str, torch.Tensor]
    errors: dict[str, dict[int, float]]

    def choose(self, budget: float) -> dict[str, int]:
        """For each layer, the fewest bits of keys with an error within the budget. Raises ValueError if a layer has none."""
        chosen = {}
        for layer, errors in self.errors.items():
            within = [bits for bits, error in errors.items() if error <= budget]
            if not within:
                least = min(errors.values())
                raise ValueError(f"--budget {budget} cannot be met: the error of {layer} is at least {least:.4f}")
            chosen[layer] = min(within)
        return chosen


def calibrate(model: str, text: str, tokens: int, context: int, measure_errors: bool = False, **arguments: Any) -> Calibration:
    """Run a model on the first `tokens` tokens of a text in windows of `context`, and again to measure the errors of pages.

    Each window starts with the tokenizer's special tokens. arguments: for the engine. Raises ValueError for a text without
    tokens, and for errors of layers that need equal pages.
    """
    from vllm import SamplingParams

    fixed = {"enforce_eager": True, "enable_prefix_caching": False, "max_model_len": context}
    if measure_errors:
        fixed["max_num_batched_tokens"] = max(context, 2048)  # for prompts that come whole
    once = SamplingParams(max_tokens=1, temperature=0, detokenize=False)
    with engine(Run.parse("SAGE"), model, **fixed, **arguments) as llm:
        config = llm.llm_engine.vllm_config.model_config
        prompts: list[Any] = [{"prompt_token_ids": each} for each in windows(llm.get_tokenizer(), text, tokens, context)]
        if not prompts:
            raise ValueError("the text is empty")
        if measure_errors and not all(llm.collective_rpc(_can_differ)):
            raise ValueError(
                "--k-bits auto is for models whose layers all attend to all tokens: elsewhere, vLLM gives every layer as many "
                "bytes as the largest"
            )
        llm.collective_rpc(_observe)
        llm.generate(prompts, once)
        of_workers = llm.collective_rpc(_means)
        found = _anchors_of(of_workers, config.get_total_num_kv_heads())
        if not measure_errors:
            return Calibration(config, found, {})
        llm.collective_rpc(_measure_errors, args=(found,))
        for prompt in tqdm(prompts, "errors of pages"):
            llm.generate(prompt, once, use_tqdm=False)
        squares = llm.collective_rpc(_squares)
    errors = {}
    for name in {name: None for worker in squares for name in worker}:
        total = {kind: sum(worker[name][kind] for worker in squares if name in worker) for kind in (*K_BITS, "exact")}
        errors[name] = {bits: (total[bits] / total["exact"]) ** 0.5 for bits in K_BITS}
    return Calibration(config, found, errors)


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit status. Errors in the input go to stderr, in one line."""
    description = "Calibrate the anchors of a model's keys and values, and the precision of keys, on a text."
    parser = argparse.ArgumentParser(prog="sage calibrate", description=description)
    parser.add_argument("model", help="folder or name")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="where to write the calibration")
    parser.add_argument("--text", type=Path, default=HELDOUT, help="text to calibrate on (default: the embedded held-out text)")
    parser.add_argument("--tokens", type=int, default=1 << 15, help="how many of its tokens (default: %(default)s)")
    window = "tokens that are read together, with a beginning-of-text token first if the tokenizer adds one"
    parser.add_argument("--context", type=int, default=2048, help=f"{window} (default: %(default)s)")
    parser.add_argument("--k-bits", choices=["auto"], help="choose the bits of each layer's keys, within --budget")
    parser.add_argument(
        "--budget", type=float, metavar="X", help="largest relative L2 error of a layer's attention, for example 0.1"
    )
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    arguments = parser.parse_args(argv)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # workers hold the means and errors
    return run_command(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    text = read_text(arguments.text)
    if arguments.tokens < 1 or arguments.context < 2:
        raise ValueError("--tokens must be at least 1 and --context at least 2")
    if not arguments.out.absolute().parent.is_dir():
        raise ValueError(f"there is no folder {arguments.out.absolute().parent} for --out")
    if (arguments.k_bits is None) != (arguments.budget is None):
        raise ValueError("--k-bits auto and --budget go together")
    if arguments.budget is not None and not arguments.budget > 0:
        raise ValueError("--budget must be above 0")
    check_model(arguments.model)
    from vllm.platforms import current_platform

    cache_limits = {"kv_cache_memory_bytes": 1 << 30} if current_platform.is_cpu() else {}
    found = calibrate(
        arguments.model, text, arguments.tokens, arguments.context, measure_errors=arguments.k_bits is not None,
        tensor_parallel_size=arguments.tensor_parallel_size, **cache_limits,
    )  # fmt: skip
    chosen = found.choose(arguments.budget) if found.errors else {}
    for layer, bits in chosen.items():
        measured = ", ".join(f"INT{each} {error:.4f}" for each, error in sorted(found.errors[layer].items(), reverse=True))
        print(f"{layer}: INT{bits} (errors: {measured})")
    save(arguments.out, found.anchors, found.model_config, chosen)
    option = json.dumps({"sage": {"calibration": str(arguments.out)}})
    values = sum(name.endswith(OF_VALUES) for name in found.anchors)
    layers = f"{len(found.anchors) - values} layers, {values} of which have one for values, too"
    print(f"{arguments.out}: anchors of {layers}. Serve with --additional-config {shlex.quote(option)}")
