"""Launches that depend on each other: decode, merge, the next decode, its merge, as layers do.

A kernel starts once all blocks of the one before have let it (`griddepcontrol.launch_dependents`)
or have ended. `griddepcontrol.wait` waits for the end of the one before, and of that one alone. All
layers have one workspace, and their results the same memory.
"""

from __future__ import annotations

import pytest

from protocol import Role, Violation, explore

BLOCKS = 2
WORKSPACE = [("workspace", block) for block in range(BLOCKS)]


def decode_block(layer: int, block: int, *, waits: bool = True) -> Role:
    role = Role(f"decode{layer}.{block}")
    if layer > 0:
        role.wait(("may_start", "merge", layer - 1), 0)
        if waits:
            role.wait(("ended", "merge", layer - 1), 0)
    role.arrive(("may_start", "decode", layer))
    role.write(("workspace", block))
    role.end(("workspace", block))
    role.arrive(("ended", "decode", layer))
    return role


def merge_block(layer: int, block: int, *, work: bool, waits: bool = True) -> Role:
    """work: it has rows to merge; one block without work waits even so (merge/launch.cu)."""
    role = Role(f"merge{layer}.{block}")
    role.wait(("may_start", "decode", layer), 0)
    if work:
        if waits:
            role.wait(("ended", "decode", layer), 0)
        role.arrive(("may_start", "merge", layer))
        role.read(layer + 1, *WORKSPACE)
        role.end(*WORKSPACE)
    else:
        role.arrive(("may_start", "merge", layer))  # as an end does, or at once
        if block == 0 and waits:
            role.wait(("ended", "decode", layer), 0)
    role.arrive(("ended", "merge", layer))
    return role


def check(work: list[bool], *, merge_waits: bool = True, decode_waits: bool = True) -> int:
    """work: which of the merge's blocks have any."""
    roles = [
        role
        for layer in range(3)
        for block in range(BLOCKS)
        for role in (
            decode_block(layer, block, waits=decode_waits),
            merge_block(layer, block, work=work[block], waits=merge_waits),
        )
    ]
    return explore(roles, lambda name: BLOCKS)


@pytest.mark.parametrize("work", [[True, True], [True, False], [False, False]], ids=str)
def test_no_layer_writes_what_another_still_uses(work):
    assert check(work) > 50


def test_a_merge_without_work_waits_even_so():
    """Else it could end before the decoding that it depends on, and the next would begin."""
    with pytest.raises(Violation, match="workspace"):
        check([False, False], merge_waits=False)


def test_partial_results_are_awaited():
    with pytest.raises(Violation, match="workspace"):
        check([True, True], merge_waits=False)


def test_decoding_awaits_the_merge_before_it():
    with pytest.raises(Violation, match="workspace"):
        check([True, True], decode_waits=False)
