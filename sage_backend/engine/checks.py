# SPDX-License-Identifier: Apache-2.0
"""What this backend cannot serve, and what to use instead.

`reasons` is asked per attention layer by vLLM (`validate_configuration`) and for the whole model by `check_config`, before
any process is started, so that a user reads one line instead of a worker's trace.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sage_backend import BACKEND
from sage_backend.engine.checkpoint import check_model_folder, check_weight_files
from sage_backend.features import calibration_file, positions
from sage_backend.options import MemoryOptions, SageOptions, VariatorOptions
from sage_backend.variator import files
from sage_backend.variator.checks import check_compression
from sage_paged import HEAD_DIMS, MAX_V_INT4_DIM

SMALL_HALF = ((8, 6), (12, 1))
"""Compute capabilities with 99 KiB of shared memory for a program and no FP8 instructions that Triton makes
(`sage_kernels.device.fp8_path`)."""

_INSTEAD = "use vLLM's default backend for it"

UNQUANTIZED = ("auto", "bfloat16", "float16")
"""Values of --kv-cache-dtype with which vLLM's own caches would not be quantized. Pages are the same with all of them."""

_UNSUPPORTED = {
    "use_mla": f"multi-head latent attention has its own compressed cache; {_INSTEAD}",
    "use_sparse": f"sparse attention of the model's own is not supported; {_INSTEAD}",
    "attention_free": f"the model has no attention layers; {_INSTEAD}",
    "use_alibi": f"attention biased by distance (ALiBi) is not supported; {_INSTEAD}",
    "use_mm_prefix": f"bidirectional attention inside image tokens is not supported; {_INSTEAD}",
    "use_non_causal": f"non-causal attention is not supported; {_INSTEAD}",
    "use_batch_invariant": f"VLLM_BATCH_INVARIANT is not supported; {_INSTEAD}",
    "use_pcp": "prefill context parallelism is not supported; use --tensor-parallel-size",
    "use_dcp": "decode context parallelism is not supported; use --tensor-parallel-size",
    "use_rswa": f"reference sliding window attention is not supported; {_INSTEAD}",
    "use_adaptive_verification": "adaptive verification is not supported; turn it off in --speculative-config",
}
"""Flags of vLLM's selector that cannot be served if they are set. Others make no difference."""


def reasons(
    head_size: int,
    dtype: torch.dtype,
    kv_cache_dtype: str | None,
    block_size: int | None,
    options: SageOptions,
    *,
    capability: Any = None,
    attn_type: str = "decoder",
    head_size_v: int | None = None,
    **flags: Any,
) -> list[str]:
    """Why this layer cannot be served, in words for the user; empty if it can. Arguments are those of vLLM's selector.

    capability: the GPU's compute capability, None on CPU; head_size_v: channels of values, None if head_size; flags: those of
    _UNSUPPORTED and others.
    """
    has_heads = not (flags.get("use_mla") or flags.get("attention_free"))
    rows = [
        (attn_type != "decoder", f"attention of type {attn_type} keeps no KV pages; {_INSTEAD}"),
        *((flags.get(flag), reason) for flag, reason in _UNSUPPORTED.items()),
        (
            has_heads and head_size not in HEAD_DIMS,
            f"head size {head_size} has no page format (there is {', '.join(map(str, HEAD_DIMS))}); {_INSTEAD}",
        ),
        (
            has_heads and head_size > MAX_V_INT4_DIM and options.v_bits == 4,
            f'head size {head_size} has no 4-bit values; leave out option "v_bits"',
        ),
        (
            has_heads and head_size_v not in (None, head_size),
            f"keys of {head_size} channels with values of {head_size_v} have no page format; {_INSTEAD}",
        ),
        (
            dtype == torch.float32 and capability is not None,
            "float32 models are served on CPU only; add --dtype bfloat16",
        ),
        (
            kv_cache_dtype not in (None, *UNQUANTIZED),
            f"--kv-cache-dtype {kv_cache_dtype} does not apply, the pages have their own format; leave it at auto and choose "
            'the precision of keys with --additional-config \'{"sage": {"k_bits": 8}}\'',
        ),
        (
            block_size is not None and block_size % options.page_tokens != 0,
            f"--block-size {block_size} is not a multiple of the {options.page_tokens} tokens of a page; leave it out",
        ),
        (capability is not None and capability < (8, 0), f"compute capability {capability} is below 8.0; {_INSTEAD}"),
        (
            # V in FP16 takes twice the room of FP8.
            capability is not None and tuple(capability) in SMALL_HALF and head_size > 256 and options.page_tokens > 64,
            f"head size {head_size} needs pages of 64 tokens on compute capability {'.'.join(map(str, capability or ()))}; add "
            '--additional-config \'{"sage": {"page_tokens": 64}}\'',
        ),
    ]
    return [reason for applies, reason in rows if applies]


def is_chosen(config: Any) -> bool:
    """Whether an engine of this configuration (VllmConfig) uses this backend."""
    return _names_this(config.attention_config)


def is_chosen_by(arguments: Any) -> bool:
    """`is_chosen`, of the configuration that vLLM will make of `arguments` (EngineArgs)."""
    return _names_this(arguments.attention_config, arguments.attention_backend)


def _names_this(attention: Any, *backends: Any) -> bool:
    """Whether an AttentionConfig or one of `backends`, which are members of vLLM's enum, names or None, names this backend."""
    named = [*backends, attention.backend, *(attention.backend_per_kind or {}).values()]
    return any(str(getattr(backend, "name", backend)).upper() == BACKEND for backend in named)


def compression(config: Any) -> tuple[VariatorOptions, list[int]] | None:
    """The option `variator` of an engine of this configuration (VllmConfig) and the ratios of its plugins, or None.

    Raises ValueError for a file that holds no plugins.
    """
    if not is_chosen(config) or (options := SageOptions.parse(config.additional_config).variator) is None:
        return None
    return options, files.contents(options.plugins)[1]


def memory(config: Any) -> MemoryOptions | None:
    """The option `memory` of an engine of this configuration (VllmConfig), or None."""
    return SageOptions.parse(config.additional_config).memory if is_chosen(config) else None


def request_topk(config: Any) -> MemoryOptions | None:
    """The option `memory` of an engine whose requests may ask for a number of recalled pages, or None."""
    found = memory(config)
    return found if found is not None and found.max_topk_pages is not None else None


def check_config(config: Any, has_metrics: bool = True) -> None:
    """Check an engine's configuration (VllmConfig) as soon as it is made, if it chooses this backend. has_metrics: whether the
    engine has any.

    Raises ValueError with one line for wrong options, or a model or a setting that cannot be served.
    """
    if not is_chosen(config):
        return
    options, model = SageOptions.parse(config.additional_config), config.model_config
    if found := reasons_of(model, config.cache_config.cache_dtype, config, options):
        raise ValueError(f"--attention-backend sage cannot serve {model.model}: {'; '.join(found)}")
    _check_front_end(options)
    if options.memory is not None:
        _check_memory(options, options.memory, model)
        if options.per_request_topk and config.parallel_config.use_ubatching:
            raise ValueError(
                '"max_topk_pages" in option "memory" in --additional-config "sage" does not go with batches that overlap; '
                "leave --enable-dbo and --ubatch-size out"
            )
        if options.memory.host_gib:
            _check_host_pages(config, options.memory.host_gib)
    if options.calibration is not None:
        _check_calibration(options.calibration, config)
    if options.canary is not None and not has_metrics:
        raise ValueError(
            'option "canary" in --additional-config "sage" reports to a metric, and --disable-log-stats turns metrics off; '
            "leave one of them out"
        )
    if options.variator is not None:
        check_compression(config, options.variator)
    if config.kv_transfer_config is not None:
        _check_connector(config, options)


def _check_front_end(options: SageOptions) -> None:
    """Raises ValueError for options that requests may override, if vLLM's front end is the one in which nothing checks them."""
    from vllm import envs  # as in `reasons_of`

    asks = {"variator": options.variator is not None, "max_topk_pages": options.per_request_topk}
    if any(asks.values()) and getattr(envs, "VLLM_USE_RUST_FRONTEND", False):
        names = " and ".join(f'"{name}"' for name, asked in asks.items() if asked)
        raise ValueError(
            f'{names} in --additional-config "sage": vLLM\'s front end in Rust does not check what requests ask for; unset '
            "VLLM_USE_RUST_FRONTEND"
        )


def reasons_of(model: Any, cache_dtype: str, config: Any, options: SageOptions) -> list[str]:
    """`reasons` for a model (ModelConfig), the target or its drafter, with the settings of a configuration (VllmConfig)."""
    # Not at the top: vLLM may be choosing its platform while this module is imported.
    from vllm.platforms import current_platform

    cache, parallel = config.cache_config, config.parallel_config
    if current_platform.is_cpu() and type(current_platform).__name__ != "SageCpuPlatform":
        # vLLM's own CPU platform would take CPU_ATTN without a word.
        raise ValueError("VLLM_TARGET_DEVICE=cpu keeps vLLM from loading this backend's CPU platform; unset it")
    attn_type = "decoder"
    if model.is_encoder_decoder:
        attn_type = "encoder_decoder"
    elif model.attn_type in ("encoder_only", "encoder"):
        attn_type = "encoder_only"
    return reasons(
        model.get_head_size(),
        model.dtype,
        cache_dtype,
        cache.block_size if cache.user_specified_block_size else None,
        options,
        capability=None if current_platform.is_cpu() else current_platform.get_device_capability(),
        attn_type=attn_type,
        head_size_v=_value_size(model.hf_text_config),
        use_mla=model.use_mla,
        attention_free=model.is_attention_free,
        use_mm_prefix=model.is_mm_prefix_lm,
        use_alibi=model.uses_alibi,
        use_pcp=parallel.prefill_context_parallel_size > 1,
        use_dcp=parallel.decode_context_parallel_size > 1,
    )


def _value_size(text: Any) -> int | None:
    """The channels of a head of values, if the configuration of a text model has them apart from those of keys.

    Such models (MiMo-V2, openPangu) do not ask vLLM's selector: they choose a backend of their own without a word. Models with
    latent attention have the attribute as well, but values as long as keys where they do without it.
    """
    if getattr(text, "kv_lora_rank", None) is not None:
        return None
    return getattr(text, "v_head_dim", None) or getattr(text, "v_channels", None)


def _check_memory(options: SageOptions, memory: MemoryOptions, model: Any) -> None:
    """Raises ValueError for memory that reads every context of a model (ModelConfig) whole, or cannot move its positions."""
    policy = replace(memory.policy, max_topk_pages=0)  # what requests that ask for nothing have
    listed = policy.list_pages(options.page_tokens, policy.query_block) * options.page_tokens
    if listed >= model.max_model_len:
        raise ValueError(
            f'option "memory" in --additional-config "sage" reads up to {listed} tokens, which is all of the '
            f"{model.max_model_len} of --max-model-len; lower local_tokens or topk_pages, or leave it out"
        )
    if memory.extrapolate:
        positions.check(model)


_WITHOUT_MODEL = ("ngram", "ngram_gpu", "suffix")
"""Methods of --speculative-config whose drafts come from no model, which would have pages of its own."""


def _check_host_pages(config: Any, host_gib: float) -> None:
    """Raises ValueError for what host pages do not go with, or if all engines on the host ask for more GiB than it has."""
    model, drafts, parallel = config.model_config, config.speculative_config, config.parallel_config
    kinds = set(getattr(model.hf_text_config, "layer_types", None) or ()) - {"full_attention"}
    gib = host_gib * parallel.data_parallel_size_local / parallel.nnodes_within_dp
    free = free_host_memory() / 2**30
    # With Ray, workers may be elsewhere. And of several API servers, each makes the configuration again, while engines that
    # were checked before already allocate. Workers ask once more.
    is_first = parallel._api_process_count == 1 or parallel._api_process_rank == -1
    is_here = is_first and parallel.distributed_executor_backend != "ray"
    rows = [
        (
            bool(kinds) or model.is_hybrid or model.get_sliding_window() or model.attention_chunk_size,
            "the model has layers that do not attend to whole contexts, whose pages cannot be in host memory",
        ),
        (bool(config.attention_config.backend_per_kind), "all layers must be this backend's; use --attention-backend"),
        (
            drafts is not None and drafts.method not in _WITHOUT_MODEL,
            "a drafter's pages cannot be in host memory; leave --speculative-config out, or choose ngram",
        ),
        (config.kv_transfer_config is not None, "a KV connector would move pages that are in host memory; leave it out"),
        (model.enable_sleep_mode, "--enable-sleep-mode would lose what the GPU knows of them; leave it out"),
        (
            getattr(parallel, "enable_elastic_ep", False),
            "an engine that joins others would not know that its pages are in host memory; leave --enable-elastic-ep out",
        ),
        (is_here and gib > free, f"{gib:g} GiB are asked for, and {free:.1f} are free in the host's memory; lower it"),
    ]
    if found := [reason for applies, reason in rows if applies]:
        raise ValueError(
            f'option "host_gib" in option "memory" in --additional-config "sage" cannot be served: {"; ".join(found)}'
        )


CGROUP = Path("/sys/fs/cgroup")
"""Where a container sees its own limits."""
CGROUP_FILES = {
    "": ("memory.max", "memory.current", "memory.stat"),
    "total_": ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
}
"""The files with a container's limit, its use and what that consists of, of cgroup versions 2 and 1, by the prefix of names in
the last one."""


def free_host_memory() -> int:
    """Bytes of host memory that this process can have, within the limit of its container."""
    import psutil  # type: ignore[import-untyped]  # of vLLM's; `sage doctor` checks configurations where vLLM is not installed

    free: int = psutil.virtual_memory().available
    for prefix, names in CGROUP_FILES.items():
        try:
            limit, used, stat = ((CGROUP / name).read_text().strip() for name in names)
        except OSError:  # another version, or no container
            continue
        if limit == "max":  # version 1 has a number above all memory
            return free
        numbers = dict(line.split() for line in stat.splitlines())
        # The kernel gives up cached files where memory is short.
        cached_files = sum(int(numbers[f"{prefix}{kind}_file"]) for kind in ("active", "inactive"))
        return min(free, int(limit) - int(used) + cached_files)
    return free


def _check_calibration(file: str, config: Any) -> None:
    """Raises ValueError for a calibration that is unusable, or has chosen what an option sets as well."""
    calibration_file.check(file, config.model_config)
    chosen = {option for bits in calibration_file.layer_bits(file).values() for option in bits}
    for option, what in (("k_bits", "keys"), ("v_bits", "values")):
        if option in chosen and option in config.additional_config["sage"]:
            raise ValueError(
                f'the calibration {file} has chosen the bits of {what}; leave out option "{option}" in --additional-config '
                '"sage"'
            )


_CPU_BLOCK = 128
"""Tokens of a block on vLLM's CPU platform, if --block-size is left out."""

_FROM_GPU = ("OffloadingConnector", "SimpleCPUOffloadConnector")
"""KV connectors that --kv-offloading-size chooses. vLLM's stores for them are filled from a GPU."""


def _check_connector(config: Any, options: SageOptions) -> None:
    """Raises ValueError for a KV connector that fails on this platform, or would hand over pages that are not whole."""
    from vllm.platforms import current_platform  # as in `reasons_of`

    transfer, cache, is_cpu = config.kv_transfer_config, config.cache_config, current_platform.is_cpu()
    own_store = "spec_module_path" in transfer.kv_connector_extra_config  # a store that is not vLLM's may work anywhere
    of_gpu = [name for name in _FROM_GPU if transfer.has_connector(name)]
    has_example = transfer.has_connector("ExampleConnector")
    # A size that nobody chose becomes that of a page, and on a CPU 128, in some releases only after this check.
    block = cache.block_size if cache.user_specified_block_size else _CPU_BLOCK if is_cpu else options.page_tokens
    rows = [
        (
            is_cpu and not own_store and of_gpu,
            f"{' and '.join(of_gpu)} moves pages between a GPU and its host, and there is no GPU; leave "
            "--kv-offloading-size and --kv-transfer-config out",
        ),
        (
            has_example and block != options.page_tokens,
            f"ExampleConnector takes a block of {block} tokens for a page of {options.page_tokens}; add --block-size "
            f"{options.page_tokens}",
        ),
        (
            has_example and options.per_request_topk,
            'ExampleConnector finds pages by tokens alone, whatever else these have read; leave "max_topk_pages" in option '
            '"memory" out',
        ),
        (
            has_example and config.scheduler_config.enable_chunked_prefill,
            "ExampleConnector stores a prompt after its first chunk, computed or not; add --no-enable-chunked-prefill",
        ),
    ]
    if found := [reason for applies, reason in rows if applies]:
        raise ValueError(f"--attention-backend sage cannot serve with --kv-transfer-config: {'; '.join(found)}")


def check_arguments(arguments: Any) -> None:
    """Check what would fail inside vLLM while it makes a configuration of `arguments` (EngineArgs).

    Raises ValueError with one line for a folder that holds no model or broken weight files, if this backend is chosen.
    """
    if not (is_chosen_by(arguments) and Path(arguments.model).is_dir()):
        return
    folder = Path(arguments.model)
    check_model_folder(folder)
    if arguments.load_format in ("auto", "safetensors", "hf"):
        check_weight_files(folder)
