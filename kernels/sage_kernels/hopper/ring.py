# SPDX-License-Identifier: Apache-2.0
"""Rings of shared-memory slots between a producer and its consumers, with an mbarrier pair per slot.

Item n takes slot n % SLOTS for the (n // SLOTS)-th time. A consumer waits until the slot is full, a producer until it is empty;
an mbarrier counts as passed in the phase before its first, so that the first round finds every slot empty.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier


@gluon.jit
def wait_full(full, n, SLOTS: gl.constexpr):
    """Wait until the producer has filled the slot of item n. full: the barriers of all slots."""
    mbarrier.wait(full.index(n % SLOTS), (n // SLOTS) & 1)


@gluon.jit
def wait_empty(empty, n, SLOTS: gl.constexpr):
    """Wait until the consumers have released the slot of item n to the producer. empty: the barriers of all slots."""
    mbarrier.wait(empty.index(n % SLOTS), ((n // SLOTS) & 1) ^ 1)
