#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What a calibration gains from counting keys further on in contexts: a real model's predictions with quantized keys.

    python3 benchmarks/studies/key_positions.py MODEL --window 16384 --windows 2 --out benchmarks/results/key-positions.json

A model of transformers reads windows of the standard library's source in float32. In every layer, keys are quantized and read
back with the arithmetic of `sage_kernels.reference`; queries, values and weights of attention stay as they are. The calibration
is that of `sage_backend.features`, of the short texts that an engine reads when it starts. It is made for contexts of several
lengths. 0 means that keys count at their own positions only.

The figures compare with exact keys. `first` and `last` are mean absolute changes of log-probabilities at both ends of a window.
The text, and so the figures, depend on the version of Python.

For models with full attention in all layers and one RoPE over whole heads in halves, such as Llama and Qwen2. On a CPU, 2048
tokens of a model with 500 million parameters take half a minute for each row of the table; long windows need a GPU.
"""

import _pydecimal
import argparse
import inspect
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/, where common/ is

import torch
import torch.nn.functional as F
from common.report import circumstances, save
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sage_backend.engine.calibration_texts import CHAT, TEXTS
from sage_backend.engine.start_calibration import MAX_TOKENS
from sage_backend.features.calibration import tensors_of
from sage_backend.features.calibration_file import OF_EQUALIZER, OF_ORDER
from sage_backend.features.observers import Statistics
from sage_kernels import LayerCalibration
from sage_kernels.reference import prepare_keys, quantize_k, restore_keys
from sage_paged import K_BITS, PageLayout

CONTEXTS = (0, 1 << 13, 1 << 14, 1 << 15, 1 << 17)
"""Tokens of the contexts that calibrations are made for."""
TEXT = (_pydecimal, tarfile, inspect, argparse)
EDGE = 2000
"""Most tokens at an end of a window; fewer in a window shorter than four times as many."""
ROWS = 2048
"""Positions whose logits are computed at a time."""


class Reader:
    """A model of transformers. change_keys: what attention reads in place of a layer's keys, from the layer's index, queries
    [tokens, heads, head_dim] and keys [tokens, kv_heads, head_dim], float32."""

    def __init__(self, path: Path) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        ALL_ATTENTION_FUNCTIONS.register("study", self.attend)
        loaded = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="study")
        self.model, self.tokenizer = loaded.eval().to(device), AutoTokenizer.from_pretrained(path)
        self.change_keys: Callable[[int, Tensor, Tensor], Tensor] = lambda _, query, key: key
        self.scale = 1.0

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, scaling: float, **__: Any) -> Any:
        """Causal attention of one window. query: [1, heads, tokens, head_dim]; key, value: [1, kv_heads, tokens, head_dim]."""
        self.scale, group = scaling, query.shape[1] // key.shape[1]
        key = self.change_keys(module.layer_idx, query[0].transpose(0, 1), key[0].transpose(0, 1)).transpose(0, 1)[None]
        key, value = (x.repeat_interleave(group, 1) for x in (key, value))
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return out.transpose(1, 2).contiguous(), None

    def hidden(self, ids: list[int]) -> Tensor:
        return self.model.base_model(torch.tensor([ids], device=self.model.device), use_cache=False).last_hidden_state[0]

    def predictions(self, ids: list[int]) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the tokens but the first, and the likeliest ones, [tokens - 1]."""
        found = []
        following = torch.tensor(ids[1:], device=self.model.device)
        for rows, true in zip(self.hidden(ids)[:-1].split(ROWS), following.split(ROWS), strict=True):
            logprobs = self.model.get_output_embeddings()(rows).log_softmax(-1)
            found.append((logprobs.gather(-1, true[:, None])[:, 0], logprobs.argmax(-1)))
        true, likeliest = zip(*found, strict=True)
        return torch.cat(true), torch.cat(likeliest)


def calibrations(reader: Reader) -> dict[int, list[LayerCalibration]]:
    """Of each layer, for each of CONTEXTS."""
    frequencies = tuple(reader.model.base_model.rotary_emb.inv_freq.tolist())
    statistics: dict[tuple[int, int], Statistics] = {}

    def observe(layer: int, query: Tensor, key: Tensor) -> Tensor:
        impl = SimpleNamespace(window=0, soft_cap=0.0, sinks=None, scale=reader.scale)
        for context in CONTEXTS:
            observer = statistics.setdefault((context, layer), Statistics(impl, frequencies, context))
            observer.begin_prompt()
            observer.stored(key, key, torch.arange(len(key), device=key.device))  # values do not matter
            observer.attended(query, torch.empty_like(query))
        return key

    reader.change_keys = observe
    for text in (*TEXTS, "\n".join(CHAT)):
        reader.hidden(reader.tokenizer.encode(text)[:MAX_TOKENS])
    made: dict[int, list[LayerCalibration]] = {context: [] for context in CONTEXTS}
    for (context, _), observer in statistics.items():
        result = observer.result()
        assert result is not None
        found = tensors_of([{"": result}], [{"": len(result)}])
        of_keys = LayerCalibration(found[""], found[OF_EQUALIZER], found[OF_ORDER])
        made[context].append(of_keys.to(reader.model.device))
    return made


def quantize(layers: list[LayerCalibration], k_bits: int) -> Callable[[int, Tensor, Tensor], Tensor]:
    """The `Reader.change_keys` that quantizes and reads back."""

    def change(layer: int, _: Tensor, key: Tensor) -> Tensor:
        layout = PageLayout(key.shape[-1], k_bits)
        codes, scale = quantize_k(prepare_keys(key, layers[layer], layout), k_bits)
        return restore_keys((codes.float() * scale[..., None]).transpose(0, 1), layers[layer], layout).transpose(0, 1)

    return change


def measure(reader: Reader, window: int, windows: int) -> list[dict[str, object]]:
    text = "\n".join(Path(module.__file__).read_text(encoding="utf-8") for module in TEXT)
    ids = reader.tokenizer.encode(text)[: window * windows]
    if len(ids) < window * windows:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than --window times --windows")
    texts = [ids[first : first + window] for first in range(0, len(ids), window)]

    def read() -> tuple[Tensor, Tensor]:
        """`Reader.predictions` of the windows, [windows, window - 1]."""
        true, likeliest = zip(*map(reader.predictions, texts), strict=True)
        return torch.stack(true), torch.stack(likeliest)

    exact, exact_likeliest = read()
    results, edge = [], min(EDGE, window // 4)
    by_context = calibrations(reader)
    for k_bits in reversed(K_BITS):
        for context, layers in by_context.items():
            reader.change_keys = quantize(layers, k_bits)
            true, likeliest = read()
            change = (true - exact).abs()
            figures = {
                "loss_change": round(float((exact - true).mean()), 5),
                "mean_abs_logprob_change": round(float(change.mean()), 4),
                "first": round(float(change[:, :edge].mean()), 4),
                "last": round(float(change[:, -edge:].mean()), 4),
                "top1_agreement": round(float((likeliest == exact_likeliest).float().mean()), 4),
            }
            results.append({"k_bits": k_bits, "context": context, **figures})
            print(row(results[-1]), flush=True)
    return results


def row(r: dict[str, Any]) -> str:
    figures = f"{r['mean_abs_logprob_change']:>9.4f} {r['first']:>7.4f} {r['last']:>7.4f} {r['top1_agreement']:>7.2%}"
    return f"K INT{r['k_bits']} {r['context']:>8} {r['loss_change']:>+9.5f} {figures}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what a calibration gains from counting keys further on in contexts.")
    parser.add_argument("model", type=Path, help="folder of a model")
    parser.add_argument("--window", type=int, default=2048, help="tokens that are read together (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=1, help="how many of them (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()
    print(f"{'':<6} {'context':>8} {'loss':>9} {'|d logp|':>9} {'first':>7} {'last':>7} {'top-1':>7}")
    with torch.inference_mode():
        reader = Reader(arguments.model)
        results = measure(reader, arguments.window, arguments.windows)
    if arguments.out:
        report = {
            **circumstances("benchmarks/studies/key_positions.py"),
            "model": arguments.model.name,
            "window": arguments.window,
            "windows": arguments.windows,
            "results": results,
        }
        save(report, arguments.out)


if __name__ == "__main__":
    main()
