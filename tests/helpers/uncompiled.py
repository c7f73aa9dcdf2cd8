# SPDX-License-Identifier: Apache-2.0
"""To be imported before the rest of vLLM: its CPU build then runs the small functions that it decorates with torch.compile, to
sample or to embed, as they are. Compiling them takes ten seconds, in every process that calls one."""

from vllm.platforms import current_platform

if current_platform.is_cpu():
    current_platform.simple_compile_backend = "eager"
