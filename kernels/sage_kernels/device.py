# SPDX-License-Identifier: Apache-2.0
"""Capabilities of a device, asked once."""

import functools
import logging

import torch

logger = logging.getLogger(__name__)


@functools.cache
def fp8_path(device: torch.device) -> str:
    """How P @ V is computed: with FP8 instructions ("native", sm_89 and later) or in float16 from decoded codes ("half"), also
    on sm_121, for which Triton 3.6 makes no FP8 instructions.

    Off the GPU, which is Triton's interpreter, P is rounded in integer arithmetic ("emulated"): the interpreter's own
    conversion to e4m3 loses the carry where rounding up reaches the next power of two (Triton 3.6).
    """
    if device.type != "cuda":
        return "emulated"
    capability = torch.cuda.get_device_capability(device)
    return "native" if capability >= (8, 9) and capability != (12, 1) else "half"


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Whether the device is of sm_90, for which there are kernels in Gluon."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


@functools.cache
def multiplies_by_warp(device: torch.device) -> bool:
    """Whether the compiler multiplies matrices by instructions of single warps (mma.sync). On sm_90 and sm_100 there are
    others, of four warps and more."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (8, 12)


@functools.cache
def gluon_available() -> bool:
    """Whether Triton's Gluon can be imported. Logs a warning, once, where it cannot."""
    try:
        import triton.experimental.gluon  # noqa: F401
    except ImportError as error:
        logger.warning("attention takes the portable kernels, which are slower: Triton's Gluon cannot be used (%s)", error)
        return False
    return True


@functools.cache
def dependent_launch(device: torch.device) -> dict[str, bool]:
    """Launch arguments of kernels that begin with `primitives.await_previous_kernel`: on sm_90 and later, these may start while
    the kernel before them in the stream still runs (programmatic dependent launch, CUDA C++ Programming Guide)."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may use."""
    if device.type != "cuda":
        return 99 * 1024
    import triton

    return triton.runtime.driver.active.utils.get_device_properties(device.index or 0)["max_shared_mem"]
