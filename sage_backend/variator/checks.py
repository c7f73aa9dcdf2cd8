# SPDX-License-Identifier: Apache-2.0
"""Checks of the option `variator` of an engine's configuration."""

from typing import Any

from sage_backend.options import VariatorOptions
from sage_backend.variator import files
from sage_backend.variator.groups import CHUNK

FFN_OP = "sage::ffn"
"""The custom op of FFNs with plugins (`sage_backend.variator.layers`)."""


def check_compression(config: Any, options: VariatorOptions) -> None:
    """Check the option `variator` of an engine's configuration (VllmConfig), and have torch.compile leave the FFNs alone.

    Raises ValueError with one line for plugins that are not this model's, or a setting they do not work with.
    """
    options.choices(files.check(options.plugins, config.model_config))
    parallel, scheduler, compilation = config.parallel_config, config.scheduler_config, config.compilation_config
    chunk = min(scheduler.max_num_batched_tokens, scheduler.long_prefill_token_threshold or CHUNK)
    found = {
        "pipeline parallelism is not supported; use --tensor-parallel-size": parallel.pipeline_parallel_size > 1,
        "batches that overlap are not supported; leave --enable-dbo and --ubatch-size out": parallel.use_ubatching,
        "LoRA is not supported; leave --enable-lora out": config.lora_config is not None,
        "blocks that leave the engine are not told apart by ratio; leave --kv-transfer-config and --kv-offloading-size out": (
            config.kv_transfer_config is not None
        ),
        f"chunks of {chunk} tokens have no room for groups; --max-num-batched-tokens and --long-prefill-token-threshold can be "
        f"{CHUNK} or more": chunk < CHUNK,
    }
    if reasons := [reason for reason, applies in found.items() if applies]:
        raise ValueError(f"the option variator cannot be used: {'; '.join(reasons)}")
    if compilation.splitting_ops and FFN_OP not in compilation.splitting_ops:
        compilation.splitting_ops.append(FFN_OP)
    activation = "silu_and_mul"
    if not {f"+{activation}", f"-{activation}"} & set(compilation.custom_ops):
        # Inside the op nothing is compiled, so the activation takes vLLM's own kernel.
        compilation.custom_ops.append(f"+{activation}")
