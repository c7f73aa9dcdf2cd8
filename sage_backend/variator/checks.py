# SPDX-License-Identifier: Apache-2.0
"""Checks of the option `variator` of an engine's configuration."""

import hashlib
from typing import Any

from sage_backend.options import VariatorOptions
from sage_backend.variator import files
from sage_backend.variator.groups import CHUNK

FFN_OP = "sage::ffn"
"""The custom op of FFNs with plugins (`sage_backend.variator.layers`)."""
GRAPH_KEY = "sage_compressed_layers"
"""The entry of additional_config with a hash of the names of these FFNs."""


def check_compression(config: Any, options: VariatorOptions) -> None:
    """Check the option `variator` of an engine's configuration (VllmConfig), and have torch.compile leave the FFNs alone.

    Raises ValueError with one line for plugins that are not this model's, or a setting they do not work with.
    """
    from vllm.v1.attention.backend import max_decode_query_len  # vLLM imports this package before its own modules

    options.choices(files.check(options.plugins, config.model_config))
    parallel, scheduler, compilation = config.parallel_config, config.scheduler_config, config.compilation_config
    chunk = min(scheduler.max_num_batched_tokens, scheduler.long_prefill_token_threshold or CHUNK)
    rows = [
        (parallel.use_ubatching, "batches that overlap are not supported; leave --enable-dbo and --ubatch-size out"),
        (
            config.kv_transfer_config is not None,
            "blocks that leave the engine do not carry their ratio; leave --kv-transfer-config and --kv-offloading-size out",
        ),
        (
            chunk < CHUNK,
            f"chunks of {chunk} tokens have no room for groups; --max-num-batched-tokens and --long-prefill-token-threshold "
            f"can be {CHUNK} or more",
        ),
        (
            max_decode_query_len(config) >= CHUNK,
            f"drafts of {max_decode_query_len(config) - 1} tokens are verified in steps that cannot be told from chunks of "
            f"{CHUNK}; set fewer num_speculative_tokens in --speculative-config",
        ),
    ]
    if reasons := [reason for applies, reason in rows if applies]:
        raise ValueError(f"the option variator cannot be used: {'; '.join(reasons)}")
    # Which FFNs are calls of FFN_OP is part of what vLLM compiles, and is in its cache's keys only if the configuration has it.
    layers = "\n".join(files.contents(options.plugins)[0])
    config.additional_config = {**config.additional_config, GRAPH_KEY: hashlib.sha256(layers.encode()).hexdigest()[:16]}
    if compilation.splitting_ops and FFN_OP not in compilation.splitting_ops:
        compilation.splitting_ops.append(FFN_OP)
    hf_config = config.model_config.hf_config
    name = getattr(hf_config, "hidden_activation", None) or hf_config.hidden_act  # the former is Gemma's
    activation = "gelu_and_mul" if "gelu" in name else "silu_and_mul"
    if not {f"+{activation}", f"-{activation}"} & set(compilation.custom_ops):
        # Inside the op nothing is compiled, so the activation takes vLLM's own kernel.
        compilation.custom_ops.append(f"+{activation}")
