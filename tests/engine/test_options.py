# SPDX-License-Identifier: Apache-2.0
"""`--additional-config '{"sage": {...}}'`: what it accepts, and the messages for what it refuses."""

from typing import Any

import pytest

from sage_backend.options import SageOptions
from sage_paged import PageLayout


@pytest.mark.parametrize("config", [None, {}, {"sage": {}}, {"other": {"k_bits": 5}}, object()])
def test_defaults(config: object) -> None:
    assert SageOptions.parse(config) == SageOptions(k_bits=8, page_tokens=128, smooth_k=True, smooth_v=True, smooth_q=False)


def test_all_options() -> None:
    smoothed = {"smooth_k": False, "smooth_v": False, "smooth_q": True}
    options = SageOptions.parse({"sage": {"k_bits": 4, "v_bits": 4, "page_tokens": 64, **smoothed}, "other": 1})
    assert options == SageOptions(k_bits=4, v_bits=4, page_tokens=64, **smoothed)
    assert options.layout(80) == PageLayout(80, k_bits=4, tokens=64, v_bits=4)
    assert options.layout(80, k_bits=8) == PageLayout(80, tokens=64, v_bits=4)


@pytest.mark.parametrize("off", [{}, {"smooth_k": False}, {"smooth_v": False}])
def test_a_calibration_smooths_either(off: dict[str, bool]) -> None:
    assert SageOptions.parse({"sage": {"calibration": "c", **off}}) == SageOptions(calibration="c", **off)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"k_bits": 5}, 'option "k_bits" in --additional-config "sage" is 5; it can be 4 or 8'),
        ({"k_bits": "8"}, 'option "k_bits" in --additional-config "sage" is \'8\'; it can be 4 or 8'),
        ({"k_bits": 8.0}, 'option "k_bits" in --additional-config "sage" is 8.0; it can be 4 or 8'),
        ({"k_bits": True}, 'option "k_bits" in --additional-config "sage" is True; it can be 4 or 8'),
        ({"v_bits": 16}, 'option "v_bits" in --additional-config "sage" is 16; it can be 4 or 8'),
        ({"page_tokens": 32}, 'option "page_tokens" in --additional-config "sage" is 32; it can be 64 or 128'),
        ({"smooth_k": 1}, 'option "smooth_k" in --additional-config "sage" is 1; it can be false or true'),
        ({"smooth_k": "no"}, 'option "smooth_k" in --additional-config "sage" is \'no\'; it can be false or true'),
        ({"smooth_q": "true"}, 'option "smooth_q" in --additional-config "sage" is \'true\'; it can be false or true'),
        ({"smooth_v": 0}, 'option "smooth_v" in --additional-config "sage" is 0; it can be false or true'),
        (
            {"kbits": 8},
            'unknown option "kbits" in --additional-config "sage"; '
            "options are calibration, canary, equalize, k_bits, memory, page_tokens, smooth_k, smooth_q, smooth_v, "
            "v_bits or variator",
        ),
        ({"calibration": 1}, 'option "calibration" in --additional-config "sage" is 1; it can be a file'),
        ({"calibration": ""}, 'option "calibration" in --additional-config "sage" is \'\'; it can be a file'),
        (
            {"calibration": "c", "smooth_k": False, "smooth_v": False, "equalize": False},
            'option "calibration" in --additional-config "sage" has nothing to do '
            'with "smooth_k", "smooth_v" and "equalize" all false; leave it out',
        ),
        ([8], 'option "sage" in --additional-config must be an object such as {"k_bits": 8}, not [8]'),
        (None, 'option "sage" in --additional-config must be an object such as {"k_bits": 8}, not None'),
    ],
)
def test_refusals(section: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole message is compared
        SageOptions.parse({"sage": section})
    assert str(caught.value) == message
