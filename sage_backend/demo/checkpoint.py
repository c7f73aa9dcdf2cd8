# SPDX-License-Identifier: Apache-2.0
"""The trained model on disk: saving it for `transformers` and vLLM, checking it, measuring it."""

import json
import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from sage_backend.demo.corpus import END_OF_TEXT
from sage_backend.demo.llama import Llama, Shape
from sage_backend.demo.passkey import KEY_DIGITS, PassKeys

CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
EVALUATION_LENGTHS = (512, 1024, 2048)


def save_checkpoint(model: Llama, shape: Shape, tokenizer: Tokenizer, out: Path) -> None:
    """Write the model in bf16, with its configuration and tokenizer, as `transformers` expects them."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.query_heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.context,
        rms_norm_eps=shape.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        attention_bias=True,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    exported: Any = LlamaForCausalLM(config)  # type: ignore[no-untyped-call]
    exported.model.load_state_dict(model.state_dict())
    exported.to(torch.bfloat16).save_pretrained(out)
    save_tokenizer(tokenizer, out)


def save_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json.

    The latter sets no `model_max_length`: the model's configuration alone says how long a text may be.
    """
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def check_export(model: Llama, shape: Shape, out: Path, ids: Tensor) -> float:
    """Largest difference between the logits of this model and of the saved one, both with bf16 weights.

    Computed in float32 on the CPU, for ids (batch, tokens). Raises RuntimeError if the two disagree.
    """
    rounded = Llama(shape).eval()
    rounded.load_state_dict({name: value.bfloat16() for name, value in model.state_dict().items()})
    saved: Any = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32)
    difference: float = (rounded(ids) - saved(ids).logits).abs().max().item()
    if not difference < 1e-3:
        raise RuntimeError(f"the saved model's logits differ by {difference}")
    return difference


@torch.no_grad()
def heldout_nats(model: Any, windows: Tensor) -> float:
    """Mean loss in nats per token of a `transformers` model on windows (windows, tokens + 1)."""
    losses = [
        F.cross_entropy(model(rows[:, :-1]).logits.float().flatten(0, 1), rows[:, 1:].flatten()).item()
        for rows in windows[:, None]
    ]
    return sum(losses) / len(losses)


@torch.no_grad()
def passkey_accuracy(model: Any, tokenizer: Tokenizer, length: int, prompts: int, seed: int) -> float:
    """Share of prompts for which greedy decoding gives the whole key. Prompt and answer have `length` tokens.

    The input is prompt and answer, in one pass. Greedy decoding gives the whole answer exactly if each digit is the likeliest
    one after the correct digits before it.
    """
    rng, passkeys = random.Random(seed), PassKeys(tokenizer)
    correct = 0
    for index in range(prompts):
        prompt, answer = passkeys.make(length - KEY_DIGITS, index / max(1, prompts - 1), rng)
        ids = torch.tensor([tokenizer.encode(prompt + answer).ids], device=model.device)
        predicted = model(ids, logits_to_keep=KEY_DIGITS + 1).logits[0, :-1].argmax(-1)
        correct += int(torch.equal(predicted, ids[0, -KEY_DIGITS:]))
    return correct / prompts


def evaluate(out: Path, tokenizer: Tokenizer, heldout: Tensor, prompts: int, seed: int) -> dict[str, Any]:
    """Measure the checkpoint as it was saved, in bf16: the figures that training.json reports."""
    model: Any = LlamaForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    model.to(heldout.device)
    return {
        "heldout_nats_per_token": heldout_nats(model, heldout),
        "passkey_prompts": prompts,
        "passkey_accuracy": {
            str(length): passkey_accuracy(model, tokenizer, length, prompts, seed)
            for length in EVALUATION_LENGTHS
        },
    }
