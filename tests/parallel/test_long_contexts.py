"""Tokens of long sequences over GPUs of one process, against one GPU with all of them."""

from __future__ import annotations

import pytest

from jax_flashmla import connect_peers
from long_contexts import check_long_context
from parallel import DEVICES, devices_of


@pytest.mark.parametrize(
    ("tokens", "s_q", "heads_split", "sums"),
    [
        (131_077, 2, False, "psum"),
        (131_077, 2, False, "peers"),
        (131_077, 2, True, "peers"),
        (524_285, 1, True, "psum"),
        (524_285, 1, True, "peers"),
    ],
)
@pytest.mark.parametrize("devices", DEVICES[1:])  # 8 CPU devices: tests/test_context.py
def test_long_contexts(
    devices: tuple[str, int], tokens: int, s_q: int, heads_split: bool, sums: str
) -> None:
    connect = connect_peers if sums == "peers" else None
    check_long_context(devices_of(*devices), tokens, s_q, heads_split=heads_split, connect=connect)
