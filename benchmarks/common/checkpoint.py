# SPDX-License-Identifier: Apache-2.0
"""Queries, keys and values of a model of transformers, for studies of what attention reads."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

Observe = Callable[[int, Tensor, Tensor], None]
"""Takes the index of a layer, its queries [kv_heads, group, tokens, head_dim], times the scale of logits, and its keys
[kv_heads, tokens, head_dim]; float32, with RoPE applied."""
Choose = Callable[[int, Tensor, Tensor], Tensor | None]
"""From the index of a layer, queries [kv_heads, group, queries, head_dim] as above, and their logits [kv_heads, group, queries,
tokens], -inf behind each: the tokens that queries read, bool [kv_heads, queries, tokens]; None for all."""


class Checkpoint:
    """A model in float32, on a GPU if there is one, that reads a context and then goes on from it in several ways at once.

    For softmax attention with a scale and causal windows: no soft cap, no learned sinks. Layers with a sliding window read it,
    and are neither observed nor asked to choose.
    """

    def __init__(self, folder: Path) -> None:
        ALL_ATTENTION_FUNCTIONS.register("checkpoint", self._attend)
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="checkpoint")
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model, self.tokenizer = loaded.eval().to(self.device), AutoTokenizer.from_pretrained(folder)
        config = self.model.config
        self.trained_tokens = int(config.max_position_embeddings)
        self.head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        """By layer: keys and values of the context, [kv_heads, tokens, head_dim]."""
        self._observe: Observe = lambda *_: None
        self._ways: Sequence[Choose] = ()

    def read(self, ids: Sequence[int], observe: Observe) -> None:
        """Read a context, densely, in place of the one before."""
        self._kept, self._observe, self._ways = {}, observe, ()
        self._hidden(torch.tensor([ids], device=self.device), 0)

    def go_on(self, ids: Sequence[int], ways: Sequence[Choose], last: int) -> Tensor:
        """Logits [ways, last, vocabulary] of the last of the tokens that follow the context, which stays as it was."""
        self._ways = ways
        first = next(iter(self._kept.values()))[0].shape[1]
        hidden = self._hidden(torch.tensor([ids], device=self.device).expand(len(ways), -1), first)
        return self.model.get_output_embeddings()(hidden[:, -last:])

    def _hidden(self, ids: Tensor, first: int) -> Tensor:
        positions = torch.arange(first, first + ids.shape[1], device=self.device).expand_as(ids)
        return self.model.base_model(ids, position_ids=positions, use_cache=False).last_hidden_state

    def _attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, scaling: float, **more: Any
    ) -> tuple[Tensor, None]:
        """query: [ways, heads, tokens, head_dim]; key, value: [ways, kv_heads, tokens, head_dim]; the result: [ways, tokens,
        heads, head_dim]."""
        if more.get("softcap") is not None or more.get("s_aux") is not None:
            raise ValueError("models with soft caps of logits or attention sinks cannot be measured here; take another")
        layer, window = module.layer_idx, more.get("sliding_window")
        query = query.unflatten(1, (key.shape[1], -1)) * scaling
        if self._ways:
            mixed = torch.stack(
                [self._going_on(layer, window, *way) for way in zip(self._ways, query, key, value, strict=True)]
            )
        else:
            self._kept[layer] = key[0], value[0]
            if not window:
                self._observe(layer, query[0], key[0])
            # Not enable_gqa: in float32, it would need the whole matrix of logits.
            key, value = (x.repeat_interleave(query.shape[2], 1) for x in (key, value))
            unread = _unread(0, key.shape[2], window, key.device) if window else None
            shown = None if unread is None else ~unread
            mixed = F.scaled_dot_product_attention(query.flatten(1, 2), key, value, shown, is_causal=shown is None, scale=1.0)
            mixed = mixed.unflatten(1, query.shape[1:3])
        return mixed.flatten(1, 2).transpose(1, 2).contiguous(), None

    def _going_on(self, layer: int, window: int | None, choose: Choose, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        past = self._kept[layer][0].shape[1]
        key, value = (torch.cat(pair, 1)[:, None] for pair in zip(self._kept[layer], (key, value), strict=True))
        logits = query @ key.mT
        logits.masked_fill_(_unread(past, key.shape[2], window, key.device), -math.inf)
        chosen = None if window else choose(layer, query, logits)
        if chosen is not None:
            logits.masked_fill_(~chosen[:, None], -math.inf)
        return logits.softmax(-1) @ value


def _unread(first: int, end: int, window: int | None, device: torch.device) -> Tensor:
    """What queries at positions first to end do not read of a context, bool [queries, end]."""
    positions, tokens = torch.arange(first, end, device=device)[:, None], torch.arange(end, device=device)
    unread = tokens > positions
    return unread | (tokens <= positions - window) if window else unread
