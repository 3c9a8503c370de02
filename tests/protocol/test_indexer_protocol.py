"""The indexer's roles: index_scores' ring, and how index_topk's blocks gather their candidates."""

from __future__ import annotations

import pytest

from protocol import Role, Violation, explore

STAGES, WARPGROUPS = 4, 2


def loads(items: list[int], stages: int = STAGES, dropped=(), warps: int = 2) -> list[Role]:
    """The loading warps: tiles in turn, whose copies may overtake each other; the last one also an
    item's queries, before its tiles."""
    roles, copies = [], []
    for warp in range(warps):
        role = Role(f"loads{warp}", dropped)
        first = 0
        for turn, tiles in enumerate([*items, 0]):  # the last one says that there are no more
            if warp == warps - 1:
                buffer = turn % 2
                if turn >= 2:
                    role.wait(("queries_empty", buffer), turn // 2 - 1)
                role.write(("queries", buffer))
                role.end(("queries", buffer))
                role.arrive(("queries_full", buffer))
            for tile in range(first, first + tiles):
                if tile % warps != warp:
                    continue
                slot = tile % stages
                if tile >= stages:
                    role.wait(("keys_empty", slot), tile // stages - 1)
                role.arrive(("issued", tile))
                copy = Role(f"copy{tile}")
                copy.wait(("issued", tile), 0)
                copy.write(("keys", slot))
                copy.end(("keys", slot))
                copy.arrive(("keys_full", slot))
                copies.append(copy)
            first += tiles
        roles.append(role)
    return [*roles, *copies]


def scores(
    items: list[int], stages: int = STAGES, dropped=(), warpgroups: int = WARPGROUPS
) -> list[Role]:
    """Two or three warpgroups, tiles in turn, however items cut them."""
    roles = []
    for warpgroup in range(warpgroups):
        role = Role(f"scores{warpgroup}", dropped)
        tile = 0
        for turn, tiles in enumerate([*items, 0]):
            buffer = turn % 2
            role.wait(("queries_full", buffer), turn // 2)
            role.read(turn // 2 + 1, ("queries", buffer))
            for _ in range(tiles):
                if tile % warpgroups == warpgroup:
                    slot = tile % stages
                    role.wait(("keys_full", slot), tile // stages)
                    role.read(tile // stages + 1, ("keys", slot))
                    role.end(("keys", slot))
                    role.arrive(("keys_empty", slot))
                tile += 1
            role.end(("queries", buffer))
            role.arrive(("queries_empty", buffer))
        roles.append(role)
    return roles


def arrivals_of(warpgroups: int):
    return lambda name: warpgroups if name[0] == "queries_empty" else 1


arrivals = arrivals_of(WARPGROUPS)


@pytest.mark.parametrize(("warps", "warpgroups", "stages"), [(2, 2, 4), (1, 2, 4), (3, 3, 3)])
@pytest.mark.parametrize("items", [[0], [9], [1, 1, 1, 1], [3, 1, 4, 2]], ids=str)
def test_scores_read_the_tiles_and_queries_that_are_theirs(items, warps, warpgroups, stages):
    roles = [*loads(items, stages, warps=warps), *scores(items, stages, warpgroups=warpgroups)]
    assert explore(roles, arrivals_of(warpgroups)) > 1


@pytest.mark.parametrize(
    "dropped",
    [("loads", "keys_empty"), ("loads", "queries_empty"), ("scores", "keys_full")],
    ids=str,
)
def test_every_wait_of_the_ring_is_needed(dropped):
    items = [3, 3, 3]
    roles = [*loads(items, dropped=[dropped]), *scores(items, dropped=[dropped])]
    with pytest.raises(Violation):
        explore(roles, arrivals)


def test_a_slot_may_not_change_between_the_warpgroups():
    """As it would with an odd number of stages: a warpgroup could take a phase for its own."""
    with pytest.raises(Violation):
        explore([*loads([9], stages=3), *scores([9], stages=3)], arrivals)


def gather(blocks: int, dropped=(), *, fit: bool = True) -> list[Role]:
    """Blocks that send tallies to all and, if they `fit`, candidates to the first.

    A block's shared memory ends with the block: whatever is on its way must have arrived.
    """
    roles = []
    for rank in range(blocks):
        role = Role(f"block{rank}", dropped)
        role.arrive(("prepared",))
        role.wait(("prepared",), 0)
        role.arrive(("tally_sent", rank))
        role.wait(("tallies_there", rank), 0)
        role.read(1, *(("tally", rank, sender) for sender in range(blocks)))
        role.end(*(("tally", rank, sender) for sender in range(blocks)))
        if not fit:
            role.arrive(("met",))
            role.wait(("met",), 0)
        elif rank > 0:
            role.arrive(("candidates_sent", rank))
        else:
            role.wait(("candidates_there",), 0)
            role.read(1, *(("candidates", sender) for sender in range(1, blocks)))
            role.end(*(("candidates", sender) for sender in range(1, blocks)))
        memory = [("tally", rank, sender) for sender in range(blocks)]
        if rank == 0:
            memory += [("candidates", sender) for sender in range(1, blocks)]
        role.write(*memory)  # another block's, from now on
        roles.append(role)
        for target in range(blocks):
            copy = Role(f"tally {rank} to {target}")
            copy.wait(("tally_sent", rank), 0)
            copy.write(("tally", target, rank))
            copy.end(("tally", target, rank))
            copy.arrive(("tallies_there", target))
            roles.append(copy)
        if fit and rank > 0:
            copy = Role(f"candidates of {rank}")
            copy.wait(("candidates_sent", rank), 0)
            copy.write(("candidates", rank))
            copy.end(("candidates", rank))
            copy.arrive(("candidates_there",))
            roles.append(copy)
    return roles


def of_gather(blocks: int):
    sizes = {"prepared": blocks, "met": blocks, "tallies_there": blocks}
    return lambda name: sizes.get(name[0], blocks - 1 if name[0] == "candidates_there" else 1)


@pytest.mark.parametrize("fit", [True, False])
def test_candidates_are_there_before_they_are_read_and_no_block_ends_early(fit):
    assert explore(gather(2, fit=fit), of_gather(2)) > 1


@pytest.mark.parametrize("barrier", ["tallies_there", "candidates_there"])
def test_every_wait_of_the_gathering_is_needed(barrier):
    with pytest.raises(Violation):
        explore(gather(2, [("block", barrier)]), of_gather(2))


def test_three_blocks_gather():
    assert explore(gather(3), of_gather(3)) > 1
