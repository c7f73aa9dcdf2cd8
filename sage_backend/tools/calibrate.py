# SPDX-License-Identifier: Apache-2.0
"""What is best for a model's keys and values, found on a text before it is served: `sage calibrate MODEL --out FILE`.

Without a calibration, the first tokens that a server stores fix the anchors (`sage_kernels.reference.fix_anchor`). Here they
are the mean keys of a whole text. They are the same for every process that loads the file, so pages may leave the process, and
they are closer to what a prompt has in its middle and at its end, where keys have been rotated further. Layers whose values
have enough in common (`LEAST_SHARE`) get an anchor of values as well, which first tokens never fix.

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
from sage_backend.tools.text import read_text, windows
from sage_paged import K_BITS

LEAST_SHARE = 0.05
"""An anchor of values is kept if it takes more than this share off their mean square. Codes of e4m3 have errors in proportion
to what they stand for, so that those of V then fall by 2.5%, and attention's, half of which or less come from V, by 1%. Less
than that is not worth touching every output once more."""


def _anchors_of(means: list[dict[str, torch.Tensor]], heads: int) -> dict[str, torch.Tensor]:
    """The anchors of a model with `heads` KV heads, as a file has them. means: those of `Means` by layer, worker by worker."""
    found = {}
    for layer in {layer: None for worker in means for layer in worker}:
        parts = torch.cat([worker[layer] for worker in means if layer in worker])
        parts = parts[:: max(1, len(parts) // heads)]  # workers beyond the number of heads repeat one
        key, value, square = (part.clone() for part in parts.unbind(1))
        found[layer] = key
        if value.square().sum() > LEAST_SHARE * square.sum():
            found[layer + OF_VALUES] = value
    return found


def _can_differ(worker: Any) -> bool:
    """Whether layers can have pages of different sizes without waste: if all need the same number of tokens."""
    from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

    return UniformTypeKVCacheSpecs.is_uniform_type(worker.get_kv_cache_spec())


def _observe(worker: Any) -> None:
    for impl in own_impls(worker.vllm_config).values():
        impl.observer = Means()


@torch.inference_mode()  # in which anchors were allocated
def _judge(worker: Any, anchors: dict[str, torch.Tensor]) -> None:
    """Have layers judged from now on, with these anchors."""
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
    """anchors: as a file has them. errors: if they were asked for, the relative L2 error of attention's output, by layer and by
    bits of keys."""

    model_config: Any
    anchors: dict[str, torch.Tensor]
    errors: dict[str, dict[int, float]]

    def choose(self, budget: float) -> dict[str, int]:
        """The least bits of each layer's keys whose error is within the budget. Raises ValueError where there are none."""
        chosen = {}
        for layer, errors in self.errors.items():
            within = [bits for bits, error in errors.items() if error <= budget]
            if not within:
                least = min(errors.values())
                raise ValueError(f"--budget {budget} cannot be met: the error of {layer} is at least {least:.4f}")
            chosen[layer] = min(within)
        return chosen


def calibrate(model: str, text: str, tokens: int, context: int, judge: bool = False, **arguments: Any) -> Calibration:
    """Read the first `tokens` tokens of a text in windows of `context`; a second time to `judge` what pages cost.

    arguments: for the engine. Raises ValueError for a text without tokens, and where layers cannot have different pages.
    """
    from vllm import SamplingParams

    fixed = {"enforce_eager": True, "enable_prefix_caching": False, "max_model_len": context}
    if judge:
        fixed["max_num_batched_tokens"] = max(context, 2048)  # for prompts that come whole
    once = SamplingParams(max_tokens=1, temperature=0, detokenize=False)
    with engine(Run.parse("SAGE"), model, **fixed, **arguments) as llm:
        config = llm.llm_engine.vllm_config.model_config
        prompts: list[Any] = [{"prompt_token_ids": each} for each in windows(llm.get_tokenizer(), text, tokens, context)]
        if not prompts:
            raise ValueError("the text is empty")
        if judge and not all(llm.collective_rpc(_can_differ)):
            raise ValueError(
                "--k-bits auto is for models whose layers all attend to all tokens: elsewhere, vLLM gives every layer as many "
                "bytes as the largest"
            )
        llm.collective_rpc(_observe)
        llm.generate(prompts, once)
        of_workers = llm.collective_rpc(_means)
        found = _anchors_of(of_workers, config.get_total_num_kv_heads())
        if not judge:
            return Calibration(config, found, {})
        llm.collective_rpc(_judge, args=(found,))
        for prompt in tqdm(prompts, "judging pages"):
            llm.generate(prompt, once, use_tqdm=False)
        squares = llm.collective_rpc(_squares)
    errors = {}
    for name in {name: None for worker in squares for name in worker}:
        total = {kind: sum(worker[name][kind] for worker in squares if name in worker) for kind in (*K_BITS, "exact")}
        errors[name] = {bits: (total[bits] / total["exact"]) ** 0.5 for bits in K_BITS}
    return Calibration(config, found, errors)


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit status; what is wrong with the input is told in one line on stderr."""
    description = "Find on a text what is best for a model's keys and values."
    parser = argparse.ArgumentParser(prog="sage calibrate", description=description)
    parser.add_argument("model", help="folder or name")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="where to write the calibration")
    parser.add_argument("--text", type=Path, default=HELDOUT, help="what to read (default: the embedded held-out text)")
    parser.add_argument("--tokens", type=int, default=1 << 15, help="how many of its tokens (default: %(default)s)")
    parser.add_argument("--context", type=int, default=2048, help="tokens that are read together (default: %(default)s)")
    parser.add_argument("--k-bits", choices=["auto"], help="choose the bits of each layer's keys, within --budget")
    parser.add_argument(
        "--budget", type=float, metavar="X", help="largest relative L2 error of a layer's attention, for example 0.1"
    )
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    arguments = parser.parse_args(argv)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine is asked for what only its workers know
    return run_command(lambda: _write(arguments))


def _write(arguments: argparse.Namespace) -> None:
    text = read_text(arguments.text)
    if arguments.tokens < 1 or arguments.context < 2:
        raise ValueError("--tokens must be at least 1 and --context at least 2")
    if not arguments.out.absolute().parent.is_dir():
        raise ValueError(f"there is no folder {arguments.out.absolute().parent} for --out")
    if (arguments.k_bits is None) != (arguments.budget is None):
        raise ValueError("--k-bits auto and --budget go together")
    if arguments.budget is not None and not arguments.budget > 0:
        raise ValueError("--budget must be above 0")
    from vllm.platforms import current_platform

    memory = {"kv_cache_memory_bytes": 1 << 30} if current_platform.is_cpu() else {}
    found = calibrate(
        arguments.model, text, arguments.tokens, arguments.context, judge=arguments.k_bits is not None,
        tensor_parallel_size=arguments.tensor_parallel_size, **memory,
    )  # fmt: skip
    chosen = found.choose(arguments.budget) if found.errors else {}
    for layer, bits in chosen.items():
        told = ", ".join(f"INT{each} {error:.4f}" for each, error in sorted(found.errors[layer].items(), reverse=True))
        print(f"{layer}: INT{bits} (errors: {told})")
    save(arguments.out, found.anchors, found.model_config, chosen)
    option = json.dumps({"sage": {"calibration": str(arguments.out)}})
    values = sum(name.endswith(OF_VALUES) for name in found.anchors)
    layers = f"{len(found.anchors) - values} layers, {values} of which have one for values, too"
    print(f"{arguments.out}: anchors of {layers}. Serve with --additional-config {shlex.quote(option)}")
