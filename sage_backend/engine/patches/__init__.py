# SPDX-License-Identifier: Apache-2.0
"""Every place where this plugin changes vLLM, one file each.

| patch             | changes                                                                  | applied                       |
| ----------------- | ------------------------------------------------------------------------ | ----------------------------- |
| config_check      | EngineArgs.create_engine_config                                          | at start                      |
| cache_declaration | EngineArgs.create_model_config; _init_kv_cache_quant of attention layers | at start; by load_model       |
| warm_up           | compile_or_warm_up_model, execute_dummy_batch of workers                 | at start                      |
| kv_cache_config   | WorkerWrapperBase.initialize_from_config                                 | at start                      |
| host_pages        | determine_available_memory, initialize_from_config of workers;           | at start;                     |
|                   | allocate_kv_cache of model runners                                       | with host_gib, by a worker    |
| kv_cache_spec     | get_kv_cache_spec of workers                                             | at start                      |
| engine_core       | EngineCore.__init__, run_busy_loop of EngineCoreProc                     | at start                      |
| load_model        | load_model of workers                                                    | at start                      |
| scheduler         | Scheduler.__init__, a scheduler's prefix lookup and chunk split          | at start                      |
| input_processor   | InputProcessor.__init__, _validate_params of a processor                 | at start                      |
| block_hash        | generate_block_hash_extra_keys                                           | with variator or              |
|                   |                                                                          | max_topk_pages, by scheduler  |
| model_runner      | execute_model and prepare_inputs of a model runner                       | with variator or              |
|                   |                                                                          | max_topk_pages, by load_model |
| pages_gauge       | PrometheusStatLogger.__init__ and record                                 | by config_check and plugin    |
| nixl_handshake    | compute_nixl_compatibility_hash                                          | with NIXL, by load_model      |
| zero_block_ids    | CPUModelRunner._zero_block_ids                                           | by SageCpuPlatform            |

A `copyreg` reducer for the enum `AttentionBackendEnum` is in `sage_backend.plugin`, through which other processes restore its
members. No patch changes engines that do not choose this backend. Each file says what it changes, why, for which releases of
vLLM, and what would make it unnecessary.

These modules import vLLM when they are applied, not when they are imported: vLLM may be in the middle of its own imports.
"""

from collections.abc import Callable

from sage_backend.engine.patches import (
    cache_declaration,
    config_check,
    engine_core,
    host_pages,
    input_processor,
    kv_cache_config,
    kv_cache_spec,
    load_model,
    scheduler,
    warm_up,
)

AT_START: tuple[Callable[[], None], ...] = (
    config_check.apply,
    cache_declaration.apply,
    warm_up.apply,
    kv_cache_spec.apply,
    kv_cache_config.apply,
    host_pages.apply,
    load_model.apply,
    engine_core.apply,
    scheduler.apply,
    input_processor.apply,
)
"""In this order, in every process that loads vLLM's plugins."""


def apply_all() -> None:
    """Apply the patches that every process needs; a second call changes nothing.

    Raises `target.PatchError`, in one line, where the installed vLLM lacks what a patch replaces.
    """
    for apply in AT_START:
        apply()
