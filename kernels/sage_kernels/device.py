"""What a device can do, asked once."""

import functools
import logging

import torch

logger = logging.getLogger(__name__)


@functools.cache
def fp8_path(device: torch.device) -> str:
    """How P @ V is computed: with FP8 instructions ("native", sm_89 and later) or in float16 from decoded codes ("half").

    Off the GPU, which is Triton's interpreter, P is rounded in integer arithmetic ("emulated"): the interpreter's own
    conversion to e4m3 loses the carry where rounding up reaches the next power of two (Triton 3.6).
    """
    if device.type != "cuda":
        return "emulated"
    return "native" if torch.cuda.get_device_capability(device) >= (8, 9) else "half"


@functools.cache
def has_own_kernels(device: torch.device) -> bool | None:
    """Whether kernels made for this device are to be asked; None if there are some, but Triton's Gluon cannot be imported."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    try:
        import triton.experimental.gluon  # noqa: F401
    except ImportError as error:
        logger.warning("attention takes the portable kernels, which are slower: Triton's Gluon cannot be used (%s)", error)
        return None
    return True


@functools.cache
def dependent_launch(device: torch.device) -> dict[str, bool]:
    """Arguments of kernels that begin with `tiles.await_kernel_before`, and so may be started while the kernel before them in
    the stream still runs (programmatic dependent launch: CUDA C++ Programming Guide; sm_90 and later)."""
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


def pipeline_stages(device: torch.device, rows: int, channels: int, page_tokens: int) -> int:
    """How many pages a program can have under way, at most 3, beside `rows` queries of `channels` (a power of two)."""
    return max(1, min((shared_memory(device) - 2 * rows * channels) // (2 * page_tokens * channels), 3))
