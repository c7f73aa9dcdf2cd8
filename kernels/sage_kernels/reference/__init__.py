# SPDX-License-Identifier: Apache-2.0
"""The specification: what every kernel of this package computes, in plain torch and float32, without tricks.

Kernels are tested against it. It runs on the CPU; speed does not matter here.
"""

from sage_kernels.reference.attention import attention, exact_attention, rope_shift_table, turn_back, turn_keys, visible_keys
from sage_kernels.reference.page_cache import EVICTION_WINDOW, MAX_AGE, fetch_pages
from sage_kernels.reference.pages import key_codes, load, prepare_keys, prepare_queries, restore_keys, store
from sage_kernels.reference.quantize import (
    FALL_BITS,
    FP8_MAX,
    LOG2E,
    P_BITS,
    TILE_ROWS,
    V_EIGHTHS,
    V_INT4_INVERSE,
    V_INT4_LEAST,
    V_SCALE_FINE,
    V_SCALES,
    QueryTerms,
    code_product,
    fine_exponent,
    pack_int4,
    qk_product,
    quantize_k,
    quantize_p,
    quantize_q,
    quantize_v,
    quantize_v_int4,
    query_terms,
    rotate_values,
    rotate_values_back,
    rotation_signs,
    rotation_span,
    tile_rows,
    tile_tokens,
    unpack_int4,
    v_int4_level,
    v_inverse_bits,
    v_levels,
)
from sage_kernels.reference.recall import REACH, SCORE_BITS, max_query_blocks, select_pages, store_summaries

__all__ = [
    "EVICTION_WINDOW", "FALL_BITS", "FP8_MAX", "LOG2E", "MAX_AGE", "P_BITS", "REACH", "SCORE_BITS", "TILE_ROWS",
    "V_EIGHTHS", "V_INT4_INVERSE", "V_INT4_LEAST", "V_SCALES", "V_SCALE_FINE", "QueryTerms", "attention",
    "code_product", "exact_attention", "fetch_pages", "fine_exponent", "key_codes", "load", "max_query_blocks",
    "pack_int4", "prepare_keys", "prepare_queries", "qk_product", "quantize_k", "quantize_p", "quantize_q",
    "quantize_v", "quantize_v_int4", "query_terms", "restore_keys", "rope_shift_table", "rotate_values",
    "rotate_values_back", "rotation_signs", "rotation_span", "select_pages", "store", "store_summaries", "tile_rows",
    "tile_tokens", "turn_back", "turn_keys", "unpack_int4", "v_int4_level", "v_inverse_bits", "v_levels", "visible_keys",
]  # fmt: skip
