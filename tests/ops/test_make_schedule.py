"""make_schedule: every tile once, in parts of equal cost, on every implementation."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cases
import jax_flashmla
from jax_flashmla import CacheFormat, SplitSchedule, make_schedule
from jax_flashmla._num_parts import default_split

TILE = 64
OVERHEAD = 2  # tiles
CUT_COST = 8  # tiles


def make_cuts(lengths: list[int] | np.ndarray, num_parts: int, implementation: str) -> np.ndarray:
    seqlens = jnp.asarray(np.asarray(lengths, np.int32))
    schedule = make_schedule(seqlens, h_q=1, num_parts=num_parts, implementation=implementation)
    assert schedule.b == len(lengths)
    assert schedule.num_parts == num_parts
    return np.asarray(schedule.cuts)


def count_tiles(lengths: list[int] | np.ndarray) -> np.ndarray:
    return np.maximum(0, -(-np.asarray(lengths, np.int64) // TILE))


def naive_cuts(lengths: list[int] | np.ndarray, num_parts: int) -> list[list[int]]:
    """The three plans of csrc/schedule/plan.h, one unit after another."""
    tiles, b = count_tiles(lengths), len(lengths)
    stride = max(1, -(-(int(tiles.sum()) + OVERHEAD * (b - 1)) // num_parts))
    uniform = next(
        (
            k
            for k in range(1, stride + OVERHEAD + 1)
            if np.maximum(1, -(-tiles // k)).sum() <= num_parts
        ),
        None,
    )
    units: list[list[int]] = []
    for sequence, count in enumerate(tiles):
        if uniform is None:
            units.extend([sequence, 0] for _ in range(OVERHEAD))
            units.extend([sequence, tile] for tile in range(int(count)))
        else:
            units.extend([sequence, tile] for tile in range(0, max(int(count), 1), uniform))
    units.extend([b, 0] for _ in range(num_parts * stride + OVERHEAD + 1))
    if uniform is not None:
        return [*units[:num_parts], [b, 0]]
    starts = np.append(0, np.cumsum(tiles + OVERHEAD))
    ideal = np.arange(num_parts + 1) * starts[-1] // num_parts
    nearest = [int(b - np.argmin(np.abs(starts - position)[::-1])) for position in ideal]
    if np.diff(starts[nearest]).max() <= stride + CUT_COST:
        return [[sequence, 0] for sequence in nearest]
    cuts = [units[OVERHEAD + part * stride if part else 0] for part in range(num_parts)]
    return [*cuts, [b, 0]]


def assert_covers_once(lengths: list[int] | np.ndarray, cuts: np.ndarray) -> None:
    tiles, b = count_tiles(lengths), len(lengths)
    assert cuts[0].tolist() == [0, 0]
    assert cuts[-1].tolist() == [b, 0]
    sequence, tile = cuts.astype(np.int64).T
    inside = sequence < b
    assert (tile[~inside] == 0).all()
    # A cut at the end of a sequence's tiles would leave an empty piece.
    assert (tile[inside] <= np.maximum(tiles[sequence[inside]] - 1, 0)).all()
    # Cuts as positions in all the tiles laid end to end: monotone, so each tile is in one part.
    tile_position = np.append(0, np.cumsum(tiles))[sequence] + tile
    assert (np.diff(tile_position) >= 0).all()
    assert (np.diff(sequence) >= 0).all()
    assert np.diff(tile_position).sum() == tiles.sum()


def assert_balanced(lengths: list[int] | np.ndarray, cuts: np.ndarray) -> None:
    """A part takes its tiles and the overhead of each of its pieces: little over the mean."""
    tiles, b, num_parts = count_tiles(lengths), len(lengths), len(cuts) - 1
    sequence, tile = cuts.astype(np.int64).T
    position = np.append(0, np.cumsum(tiles))[sequence] + tile
    pieces = sequence[1:] - sequence[:-1] + (tile[1:] > 0)
    cost = np.diff(position) + OVERHEAD * np.where(np.diff(position) + pieces > 0, pieces, 0)
    mean = -(-(tiles.sum() + OVERHEAD * b) // num_parts)
    assert cost.max() <= mean + 2 * OVERHEAD + 1 + CUT_COST


ragged_lengths = st.lists(
    st.one_of(
        st.just(0), st.integers(1, 200), st.integers(0, 20000), st.sampled_from([63, 64, 65])
    ),
    min_size=1,
    max_size=40,
)


@pytest.mark.parametrize("name", ["xla", "kernel"])
@settings(max_examples=100)
@given(lengths=ragged_lengths, which=st.integers(0, 1))
def test_any_ragged_batch(name: str, lengths: list[int], which: int) -> None:
    # Padding the batch would change it: to compile few shapes, draw few sizes instead.
    parts_of = {1: (1, 256), 2: (3, 8), 5: (3, 132), 16: (8, 132), 40: (8, 256)}
    b = next(size for size in parts_of if size >= len(lengths))
    num_parts = parts_of[b][which]
    lengths = [*lengths, *lengths[: b - len(lengths)]]
    lengths += [0] * (b - len(lengths))
    with jax.default_device(jax.devices("cpu")[0]):
        cuts = make_cuts(lengths, num_parts, name)
    assert cuts.tolist() == naive_cuts(lengths, num_parts)
    assert_covers_once(lengths, cuts)
    assert_balanced(lengths, cuts)


def big_batches() -> list:
    rng = np.random.default_rng(cases.SEED)
    ones_and_a_huge = np.ones(4096, np.int32)
    ones_and_a_huge[1234] = 4_000_000
    sparse = np.where(rng.random(9999) < 0.1, rng.integers(1, 5000, 9999), 0)
    return [
        pytest.param(rng.integers(0, 40000, 16384), 132, id="b16384"),
        pytest.param(np.zeros(16384, np.int32), 132, id="all-empty"),
        pytest.param(np.full(16384, 131072), 132, id="b16384-long"),
        pytest.param(ones_and_a_huge, 132, id="one-huge"),
        pytest.param(sparse, 132, id="mostly-empty"),
        pytest.param([2**31 - 1], 132, id="longest"),
        pytest.param([2**31 - 1] * 30, 132, id="many-longest"),
        pytest.param([5], 256, id="more-parts-than-tiles"),
        pytest.param(rng.integers(0, 40000, 128), 1, id="one-part"),
        pytest.param([-1, -(2**31), 100], 7, id="negative-counts-as-empty"),
    ]


@pytest.mark.parametrize(("lengths", "num_parts"), big_batches())
def test_large_and_lopsided_batches(
    lengths: np.ndarray, num_parts: int, implementation: str
) -> None:
    cuts = make_cuts(lengths, num_parts, implementation)
    assert_covers_once(lengths, cuts)
    assert_balanced(lengths, cuts)
    with jax.default_device(jax.devices("cpu")[0]):
        np.testing.assert_array_equal(cuts, make_cuts(lengths, num_parts, "xla"))


@pytest.mark.parametrize(("b", "tiles"), [(1, 132), (2, 66), (4, 33), (12, 11), (132, 1)])
def test_as_many_tiles_as_parts_are_a_tile_each(b: int, tiles: int, implementation: str) -> None:
    cuts = make_cuts(np.full(b, tiles * TILE), b * tiles, implementation)
    expected = [(i, tile) for i in range(b) for tile in range(tiles)] + [(b, 0)]
    np.testing.assert_array_equal(cuts, expected)


def test_longer_than_32_bits_can_count_still_covers_everything(implementation: str) -> None:
    lengths = np.full(16384, 2**31 - 1)
    assert_covers_once(lengths, make_cuts(lengths, 132, implementation))


def test_batch_invariant_cuts_no_sequence() -> None:
    for lengths, num_parts in ([5000, 64, 0, 70, 129], 132), ([5000, 64, 0, 70, 129], 2), ([9], 1):
        seqlens = jnp.asarray(lengths, jnp.int32)
        cuts = make_schedule(seqlens, h_q=1, num_parts=num_parts, batch_invariant=True).cuts
        assert_covers_once(lengths, np.asarray(cuts))
        assert not cuts[:, 1].any()


def test_default_parts_fill_a_hopper() -> None:
    """132 multiprocessors, or those of the local GPU, over the tiles of 64 query rows."""
    seqlens = jnp.zeros(2, jnp.int32)

    def parts(**heads: int) -> int:
        make = functools.partial(make_schedule, implementation="xla", **heads)
        return jax.eval_shape(make, seqlens).num_parts

    count = parts(h_q=1)
    if not any(device.platform == "gpu" for device in jax.devices()):
        assert count == 132
    assert parts(h_q=64) == count
    assert parts(h_q=65) == count // 2
    assert parts(h_q=128) == count // 2
    assert parts(h_q=128, s_q=2) == count // 4
    assert parts(h_q=128, h_kv=8) == count // 8
    assert parts(h_q=128, h_kv=128, s_q=4) == max(1, count // 128)
    assert parts(h_q=128, h_kv=8, s_q=2) == count // 16  # a tile has one query token's rows
    assert parts(h_q=4096, s_q=8) == 1


def test_small_problems_have_few_parts_by_default() -> None:
    """At most two tiles of 64 tokens and 16 query rows a multiprocessor, of 132."""

    def parts(b: int, max_seqlen: int | None, **heads: int) -> int:
        split = default_split(b=b, max_seqlen=max_seqlen, **{"s_q": 1, "h_kv": 1, **heads})
        return split.num_parts

    assert parts(1, 33 * 64, h_q=128) == 132 // 8
    assert parts(1, 33 * 64 + 1, h_q=128) == parts(1, None, h_q=128) == 132 // 2
    assert parts(33, 64, h_q=128) == 132 // 8
    assert parts(34, 64, h_q=128) == 132 // 2
    assert parts(4, 0, h_q=128) == 132 // 8
    assert parts(1, 64, h_q=17) == 132 // 2
    assert parts(1, 64, h_q=16) == parts(100, 64, h_q=16) == 132
    assert parts(1, 64, h_q=32, h_kv=2, s_q=3) == 132 // 6
    assert parts(1, 64, h_q=128, s_q=17) == 132 // 34  # 136 tiles of 16 rows are too many


def test_fp8_rows_have_small_tiles_in_larger_problems() -> None:
    """At most eight tiles of 64 tokens and 32 query rows a multiprocessor, of 132."""
    split = functools.partial(default_split, s_q=1, h_kv=1, format="fp8_row")
    most = 8 * 132 // 2 * 64
    assert split(b=1, h_q=64, max_seqlen=2112) == (132 // 4, 16)
    assert split(b=1, h_q=64, max_seqlen=most) == (132 // 2, 32)
    assert split(b=1, h_q=64, max_seqlen=most + 1) == (132, 64)
    assert split(b=1, h_q=32, max_seqlen=most) == (132, 64)  # one tile anyway
    schedule = functools.partial(
        make_schedule, jnp.zeros(1, jnp.int32), h_q=64, max_seqlen=most, implementation="xla"
    )
    assert schedule(format=CacheFormat(name="v32", block_size=64)).tile_rows == 32
    assert schedule(format=CacheFormat()).tile_rows == schedule().tile_rows == 64
    with pytest.raises(TypeError, match="format must be a CacheFormat or None, got str"):
        schedule(format="v32")


def test_v32_rows_have_parts_for_tiles_of_64_rows_in_larger_problems() -> None:
    """At most sixteen tiles a multiprocessor: a kernel of its own takes what is called 32 there."""
    split = functools.partial(default_split, s_q=1, h_kv=1, format="v32")
    most = 16 * 132 * 64
    assert split(b=1, h_q=64, max_seqlen=2112) == (132 // 4, 16)
    assert split(b=1, h_q=64, max_seqlen=most) == (132, 32)
    assert split(b=1, h_q=64, max_seqlen=most + 1) == (132, 64)
    assert split(b=2, h_q=128, max_seqlen=most // 4) == (132 // 2, 32)
    assert split(b=1, h_q=32, max_seqlen=most) == (132, 64)


def test_max_seqlen_reaches_the_default() -> None:
    seqlens = jnp.zeros(1, jnp.int32)
    for h_q in (16, 128):
        schedule = make_schedule(seqlens, h_q=h_q, max_seqlen=64)
        expected = default_split(b=1, s_q=1, h_q=h_q, h_kv=1, max_seqlen=64)
        assert (schedule.num_parts, schedule.tile_rows) == expected
        assert schedule.tile_rows == 16
    given = make_schedule(seqlens, h_q=128, max_seqlen=64, num_parts=5)
    assert (given.num_parts, given.tile_rows) == (5, 64)


def test_batch_invariant_schedules_have_as_many_parts_in_any_batch() -> None:
    """And the same tiles: the kernel's bits depend on them."""
    one, many = (
        make_schedule(jnp.zeros(b, jnp.int32), h_q=128, max_seqlen=64, batch_invariant=True)
        for b in (1, 100)
    )
    assert one.num_parts == many.num_parts
    assert one.tile_rows == many.tile_rows == 64


def test_schedule_is_a_pytree_with_one_leaf() -> None:
    schedule = make_schedule(jnp.asarray([70, 900], jnp.int32), h_q=4, num_parts=5)
    (leaf,) = jax.tree.leaves(schedule)
    assert leaf is schedule.cuts
    same = jax.tree.map(lambda x: x, schedule)
    assert isinstance(same, SplitSchedule)
    assert same.b == 2
    through = jax.jit(lambda s: jax.tree.map(lambda x: x + 0, s))(schedule)
    assert (through.b, through.num_parts) == (2, 5)
    np.testing.assert_array_equal(through.cuts, schedule.cuts)


def test_schedules_of_a_step_are_merged_by_xla() -> None:
    """Layers that are given no schedule share one in a jitted step."""

    @jax.jit
    def layers(q: jax.Array, blocks: jax.Array, table: jax.Array, seqlens: jax.Array) -> jax.Array:
        for _ in range(3):
            q, _ = jax_flashmla.dense_decode(q, blocks, table, seqlens, d_v=8)
        return q

    inputs = cases.make_inputs(cases.DecodeCase(2, 1, 100, 4, d_qk=8, d_v=8))
    with jax.default_device(jax.devices("cpu")[0]):
        hlo = layers.lower(*inputs.arguments).compile().as_text()
    assert hlo.count("flashmla_dense_decode_v1") == 3
    assert hlo.count("flashmla_make_schedule_v1") == 1
