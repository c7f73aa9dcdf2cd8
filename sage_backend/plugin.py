# SPDX-License-Identifier: Apache-2.0
"""The entry points that vLLM finds. Each may be called several times, in every process of a server.

Every vLLM process of a machine that has this package calls `register`, with whatever backend it serves. So this module imports
nothing but the standard library, and its functions import vLLM, which is loading them, when they are called.
"""

import copyreg
import logging
from typing import Any

from sage_backend import BACKEND, TESTED_VLLM, __version__

_BACKEND_CLASS = "sage_backend.engine.backend.SageBackend"
_CPU_PLATFORM = "sage_backend.engine.cpu_platform.SageCpuPlatform"

_registered = False
logger = logging.getLogger(__name__)


def register() -> None:
    """`vllm.general_plugins`: make `--attention-backend sage` known to this process, and patch vLLM for it.

    Raises `engine.patches.target.PatchError`, in one line, for a release of vLLM that lacks what a patch replaces.
    """
    global _registered
    backend_member(BACKEND)
    if not _registered:
        from sage_backend.engine import patches

        _warn_if_untested()
        patches.apply_all()
        _registered = True


def is_registered() -> bool:
    """Whether vLLM has loaded this plugin in this process. The platform's entry point alone makes only the name known."""
    return _registered


def backend_member(name: str) -> Any:
    """vLLM's enum member of the backend `name`, after registering this backend. Raises KeyError if there is none."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if BACKEND not in AttentionBackendEnum.__members__:
        from sage_backend.engine import releases

        releases.add_backend(BACKEND, _BACKEND_CLASS)
        # What: a reducer for the enum. Why: a configuration is sent to processes that unpickle it before they load plugins. An
        # enum member is pickled by value, which does not exist there yet; restoring it by a function registers it first.
        # Releases: 0.31 to 0.33. Remove when: members are pickled by name through a function that loads plugins.
        copyreg.pickle(AttentionBackendEnum, _reduce_member)  # type: ignore[arg-type]
    return AttentionBackendEnum[name]


def _reduce_member(member: Any) -> tuple[Any, tuple[str]]:
    return restore_member, (member.name,)


def restore_member(name: str) -> Any:
    """`backend_member`, for a configuration that another process has made. This one may export its metrics.

    Replicas of Ray Serve on GPUs get their configuration from a task, and load no plugins.
    """
    member = backend_member(name)
    if name == BACKEND:
        from sage_backend.engine.patches import pages_gauge

        pages_gauge.apply()
    return member


def cpu_platform() -> str | None:
    """`vllm.platform_plugins`: on a CPU build of vLLM, a platform that lets the user choose this backend.

    vLLM resolves its platform while it imports `vllm.config`, on every machine. So the name is known here before there
    can be an AttentionConfig, which looks names up when it is made. `register` is called later, with EngineArgs.
    """
    from vllm.platforms import cpu_platform_plugin

    backend_member(BACKEND)
    return None if cpu_platform_plugin() is None else _CPU_PLATFORM


def _warn_if_untested() -> None:
    from vllm import __version__ as version

    if version.split("+")[0] not in TESTED_VLLM:
        logger.warning(
            "sage-backend %s was tested with vLLM %s; this is vLLM %s, and it may not work",
            __version__, ", ".join(TESTED_VLLM), version,
        )  # fmt: skip
