"""The wide sparse decode kernel: csrc/sm90/sparse_decode/wide/{scores,values,convert,plan}.cuh.

Two of the score warps stand for all, and one of each other warpgroup. The value products of a tile
wait for the next scores to be issued where their keys are there already: `eager` is the order where
they are not; what happens lies between the two.
"""

from __future__ import annotations

import pytest

from protocol import Role, Violation, explore

BUFFERS, PLANS, AHEAD, SUMS = 2, 8, 4, 3
SCORES = ("score0", "score1")
VALUES = ("left", "right")
ARRIVALS = {
    "planned": len(SCORES),
    "keys_empty": len(VALUES),
    "scores_done": len(SCORES),
    "probabilities_stored": len(SCORES),
    "values_go": len(SCORES),
}
QUERY = ("query",)


def keys(tile: int, half: int) -> tuple:
    """The latent columns of half of a tile's tokens."""
    return "keys", half, tile % BUFFERS


def rope(tile: int) -> list[tuple]:
    """A tile's rope columns, then each score warp's probabilities."""
    return [("rope", name, tile % BUFFERS) for name in SCORES]


def plan(tile: int) -> list[tuple]:
    return [("plan", name, tile % PLANS) for name in SCORES]


def barrier(name: str, tile: int) -> tuple:
    return name, tile % BUFFERS


def score_warp(name: str, pieces: list[int], drop: set, eager: bool) -> Role:
    warp = Role(name, drop)
    total, planned, tile = sum(pieces), 0, 0

    def plan_to(count: int) -> None:
        nonlocal planned
        while planned < min(count, total + 1):  # the last one says that there is none
            mine = ("plan", name, planned % PLANS)
            warp.write(mine)
            warp.end(mine)
            warp.arrive(("planned", planned % PLANS))
            planned += 1

    def start(n: int) -> None:
        warp.wait(barrier("keys_full", tile), tile // BUFFERS)
        warp.read(tile // BUFFERS + 1, keys(tile, 0), keys(tile, 1))
        warp.read(2 * (tile // BUFFERS) + 1, *rope(tile))
        warp.read(n + 1, QUERY)

    def load_query() -> None:
        if name == SCORES[0]:
            warp.arrive(("query_issued",))

    plan_to(2)
    load_query()
    for n, tiles in enumerate(pieces):
        warp.wait(("query_full",), n)
        for last in [False] * (tiles - 1) + [True]:
            go = barrier("values_go", tile - 1)  # of the tile before
            if eager and tile > 0:
                warp.arrive(go)
            start(n)
            if not eager and tile > 0:
                warp.arrive(go)
            plan_to(tile + 1 + AHEAD)
            warp.end(keys(tile, 0), keys(tile, 1), *rope(tile), QUERY)
            warp.arrive(barrier("scores_done", tile))
            warp.read(tile // PLANS + 1, *plan(tile))  # which tokens are attended
            warp.end(*plan(tile))
            stored = [("rescale", name, tile % BUFFERS), ("rope", name, tile % BUFFERS)]
            warp.write(stored[0])
            warp.wait(barrier("scores_done", tile), tile // BUFFERS)
            warp.write(stored[1])
            if last:
                warp.write(("inverse_sum", name, n % SUMS))
                warp.end(("inverse_sum", name, n % SUMS))
                if n + 1 < len(pieces):
                    load_query()
            warp.end(*stored)
            warp.arrive(barrier("probabilities_stored", tile))
            if last and n + 1 == len(pieces):
                warp.arrive(barrier("values_go", tile))
            tile += 1
    return warp


def value_warp(name: str, pieces: list[int], drop: set) -> Role:
    warp = Role(name, drop)
    tile = 0
    for n, tiles in enumerate(pieces):
        for _ in range(tiles):
            round = tile // BUFFERS
            powers = [("rescale", score, tile % BUFFERS) for score in SCORES]
            warp.wait(barrier("probabilities_stored", tile), round)
            warp.read(round + 1, *powers)
            warp.wait(barrier("values_go", tile), round)
            warp.read(round + 1, keys(tile, 0), keys(tile, 1))
            warp.read(2 * round + 2, *rope(tile))
            warp.end(keys(tile, 0), *powers)
            warp.arrive(("keys_empty", 0, tile % BUFFERS))
            warp.end(keys(tile, 1), *rope(tile))
            warp.arrive(("keys_empty", 1, tile % BUFFERS))
            tile += 1
        sums = [("inverse_sum", score, n % SUMS) for score in SCORES]
        warp.read(n // SUMS + 1, *sums)
        warp.end(*sums)
    return warp


def convert_warp(pieces: list[int], drop: set, ahead: bool) -> Role:
    """ahead: it loads the next tile's first rows before it is done with a tile."""
    warp = Role("convert", drop)
    for tile in range(sum(pieces)):
        warp.wait(("planned", tile % PLANS), tile // PLANS)
        warp.read(tile // PLANS + 1, *plan(tile))
        for half in range(2):
            warp.wait(("keys_empty", half, tile % BUFFERS), tile // BUFFERS - 1)
            warp.write(keys(tile, half))
        warp.write(*rope(tile))
        if ahead:
            warp.wait(("planned", (tile + 1) % PLANS), (tile + 1) // PLANS)
            warp.read((tile + 1) // PLANS + 1, *plan(tile + 1))
            warp.end(*plan(tile + 1))
        warp.end(*plan(tile), keys(tile, 0), keys(tile, 1), *rope(tile))
        warp.arrive(barrier("keys_full", tile))
    warp.wait(("planned", sum(pieces) % PLANS), sum(pieces) // PLANS)
    return warp


def engine(pieces: list[int], drop: set) -> Role:
    copies = Role("tma", drop)
    for n in range(len(pieces)):
        copies.wait(("query_issued",), n)
        copies.write(QUERY)
        copies.end(QUERY)
        copies.arrive(("query_full",))
    return copies


def check(
    pieces: list[int], drop: set = frozenset(), *, eager: bool = True, ahead: bool = True
) -> int:
    """pieces: their tiles; empty ones have no part in the protocol."""
    roles = [
        *(score_warp(name, pieces, drop, eager) for name in SCORES),
        *(value_warp(name, pieces, drop) for name in VALUES),
        convert_warp(pieces, drop, ahead),
        engine(pieces, drop),
    ]
    return explore(roles, lambda name: ARRIVALS.get(name[0], 1))


@pytest.mark.parametrize("pieces", [[1], [11], [2, 3], [1] * 5], ids=str)
@pytest.mark.parametrize(("eager", "ahead"), [(True, True), (False, False)])
def test_every_interleaving_is_safe(pieces, eager, ahead):
    assert check(pieces, eager=eager, ahead=ahead) > 50


@pytest.mark.parametrize(
    "dropped",
    [
        ("score", "keys_full"),
        ("score", "query_full"),
        ("score", "scores_done"),
        ("left", "probabilities_stored"),
        ("convert", "planned"),
        ("convert", "keys_empty"),
    ],
    ids="-".join,
)
def test_what_each_wait_is_for(dropped):
    with pytest.raises(Violation):
        check([3, 2], {dropped})


def test_a_ring_of_plans_must_be_longer_than_what_is_planned_ahead(monkeypatch):
    monkeypatch.setattr(f"{__name__}.PLANS", AHEAD)
    with pytest.raises(Violation):
        check([7])


def test_sums_of_two_pieces_would_not_do(monkeypatch):
    """A value warpgroup stores a piece while two more are computed."""
    monkeypatch.setattr(f"{__name__}.SUMS", 2)
    with pytest.raises(Violation, match="inverse_sum"):
        check([1] * 4)
