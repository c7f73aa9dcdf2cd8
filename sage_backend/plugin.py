# SPDX-License-Identifier: Apache-2.0
"""What vLLM finds by entry point. Each function may be called several times, in every process of a server."""

import copyreg
import logging
from typing import Any

from sage_backend import BACKEND, TESTED_VLLM, __version__

_BACKEND_CLASS = "sage_backend.engine.backend.SageBackend"
_checking = False  # whether engine configurations are being checked in this process
logger = logging.getLogger(__name__)


def register() -> None:
    """`vllm.general_plugins`: make `--attention-backend sage` known to this process."""
    backend_member(BACKEND)
    if not _checking:
        _warn_if_untested()
        _check_configurations()
        _set_apart_made_up_requests()
        _let_layers_differ()
        _prepare_models()
        _attach_compression()


def backend_member(name: str) -> Any:
    """vLLM's enum member `name`, after making sure that ours is among them."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if BACKEND not in AttentionBackendEnum.__members__:
        register_backend(BACKEND, _BACKEND_CLASS)
        # The engine's configuration is sent to processes that unpickle it before they load plugins. An enum member is
        # pickled by value, which would not exist there yet; this way it is restored by a function that registers first.
        copyreg.pickle(AttentionBackendEnum, _reduce_member)  # type: ignore[arg-type]
    return AttentionBackendEnum[name]


def _reduce_member(member: Any) -> tuple[Any, tuple[str]]:
    return restore_member, (member.name,)


def restore_member(name: str) -> Any:
    """`backend_member`, for a configuration that another process has made and this one may show the metrics of.

    That is how it is in replicas of Ray Serve on GPUs, which get theirs from a task and look for no plugins.
    """
    member = backend_member(name)
    if name == BACKEND:
        from sage_backend.observability.exporter import follow_schedulers

        follow_schedulers()
    return member


def cpu_platform() -> str | None:
    """`vllm.platform_plugins`: on a CPU build of vLLM, a platform that lets the user choose this backend."""
    from vllm.platforms import cpu_platform_plugin

    return None if cpu_platform_plugin() is None else "sage_backend.engine.cpu_platform.SageCpuPlatform"


def _check_configurations() -> None:
    """Have every engine configuration checked where it is made.

    vLLM asks a backend what it supports only in the workers, where a refusal ends in pages of other processes' traces.
    """
    from vllm.engine.arg_utils import EngineArgs

    global _checking
    _checking = True
    create = EngineArgs.create_engine_config

    def create_and_check(self: Any, *args: Any, **kwargs: Any) -> Any:
        from sage_backend.engine.checks import check_arguments, check_config, is_chosen
        from sage_backend.observability.exporter import export

        check_arguments(self)
        config = create(self, *args, **kwargs)
        check_config(config, has_metrics=not self.disable_log_stats)
        if is_chosen(config) and not self.disable_log_stats:
            export(config)
        return config

    EngineArgs.create_engine_config = create_and_check


def _set_apart_made_up_requests() -> None:
    """Have workers forget the anchors that their warm-up has fixed, and count requests of users only.

    The first tokens fix what keys are smoothed by, and on a GPU vLLM warms up with made-up requests that look like any other.
    So do the dummy batches that keep idle data parallel engines in step with the others.
    """
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    def compile_or_warm_up_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        from sage_backend.observability import recorder

        with recorder.paused():
            times = self.worker.compile_or_warm_up_model(*args, **kwargs)
        for layer in self.vllm_config.compilation_config.static_forward_context.values():
            # Layers of other backends have no anchor, and ours is not imported where it is not used.
            if forget_anchor := getattr(getattr(layer, "impl", None), "forget_anchor", None):
                forget_anchor()
        return times

    def execute_dummy_batch(self: Any, *args: Any, **kwargs: Any) -> Any:
        from sage_backend.observability import recorder

        with recorder.paused():
            return self.worker.execute_dummy_batch(*args, **kwargs)

    WorkerWrapperBase.compile_or_warm_up_model = compile_or_warm_up_model
    WorkerWrapperBase.execute_dummy_batch = execute_dummy_batch


def _let_layers_differ() -> None:
    """Have workers ask for pages layer by layer: vLLM asks a backend, which is not told the layer."""
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    def get_kv_cache_spec(self: Any) -> Any:
        from sage_backend.engine.checks import is_chosen

        specs = self.worker.get_kv_cache_spec()
        if not is_chosen(self.vllm_config):
            return specs
        from sage_backend.engine.backend import choose_pages

        return choose_pages(specs, self.vllm_config)

    WorkerWrapperBase.get_kv_cache_spec = get_kv_cache_spec


def _prepare_models() -> None:
    """Have workers, once a model is loaded, tell layers that turn pages how its positions work, and attach the compression
    plugins of the option `variator`."""
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        self.worker.load_model(*args, **kwargs)
        layers = self.vllm_config.compilation_config.static_forward_context.values()
        if any(getattr(getattr(layer, "impl", None), "turns_pages", False) for layer in layers):
            from sage_backend.features import positions

            positions.find_frequencies(self.worker.get_model(), self.vllm_config)
        if found := _compression(self.vllm_config):
            from sage_backend.variator import layers as compressed

            compressed.attach(self.worker, self.vllm_config, *found)

    WorkerWrapperBase.load_model = load_model


def _attach_compression() -> None:
    """Attach compression plugins where an engine has the option `variator`: its scheduler gives requests ratios, and its server
    refuses requests that ask for what there is not."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.input_processor import InputProcessor

    init_scheduler, init_processor = Scheduler.__init__, InputProcessor.__init__

    def init_and_attach(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        init_scheduler(self, vllm_config, *args, **kwargs)
        if found := _compression(vllm_config):
            from sage_backend.variator import admission

            admission.attach(self, *found)

    def init_and_check(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        init_processor(self, vllm_config, *args, **kwargs)
        if found := _compression(vllm_config):
            from sage_backend.variator import admission

            validate = self._validate_params

            def check_and_validate(params: Any, *args: Any, **kwargs: Any) -> Any:
                admission.check_request(params, found[1])
                return validate(params, *args, **kwargs)

            self._validate_params = check_and_validate

    Scheduler.__init__ = init_and_attach
    InputProcessor.__init__ = init_and_check


def _compression(config: Any) -> Any:
    """The option `variator` of an engine of this configuration (VllmConfig) and the ratios of its plugins, or None."""
    from sage_backend.engine.checks import is_chosen
    from sage_backend.options import SageOptions

    if not is_chosen(config) or (options := SageOptions.parse(config.additional_config).variator) is None:
        return None
    from sage_backend.variator import files

    return options, files.contents(options.plugins)[1]


def _warn_if_untested() -> None:
    from vllm import __version__ as version

    if version.split("+")[0] not in TESTED_VLLM:
        logger.warning(
            "sage-backend %s was tested with vLLM %s; this is vLLM %s, and it may not work",
            __version__, ", ".join(TESTED_VLLM), version,
        )  # fmt: skip
