"""cache_append and copy_blocks: what they write, what they leave alone, and that in place."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_flashmla import BlockAllocator, cache_append, copy_blocks

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("cpu", "xla"), id="cpu-xla"),
        pytest.param(("cpu", "kernel"), id="cpu-kernel"),
        pytest.param(("cuda", "xla"), id="cuda-xla", marks=pytest.mark.gpu),
        pytest.param(("cuda", "kernel"), id="cuda-kernel", marks=pytest.mark.gpu),
    ],
)
def implementation(request):
    """The name of an implementation, with its platform's device the default one."""
    platform, name = request.param
    with jax.default_device(jax.devices(platform)[0]):
        yield name


@dataclasses.dataclass
class Append:
    """Arguments of a cache_append, on the host."""

    blocks: np.ndarray
    rows: np.ndarray
    block_table: np.ndarray
    positions: np.ndarray
    num_new: np.ndarray | None

    def expected(self):
        """What the cache holds afterwards, row by row."""
        blocks = self.blocks.copy()
        num_blocks, block_size = blocks.shape[:2]
        b, s_new = self.rows.shape[:2]
        for i in range(b):
            for j in range(s_new if self.num_new is None else min(s_new, self.num_new[i])):
                block, slot = divmod(int(self.positions[i]) + j, block_size)
                if not 0 <= block < self.block_table.shape[1]:
                    continue
                if 0 <= self.block_table[i, block] < num_blocks:
                    blocks[self.block_table[i, block], slot] = self.rows[i, j]
        return blocks

    def check(self, implementation):
        num_new = None if self.num_new is None else jnp.asarray(self.num_new)
        arrays = [self.blocks, self.rows, self.block_table, self.positions]
        blocks = jitted(implementation)(*map(jnp.array, arrays), num_new=num_new)
        np.testing.assert_array_equal(bits(blocks), bits(self.expected()))


@functools.cache
def jitted(implementation):
    return jax.jit(functools.partial(cache_append, implementation=implementation), donate_argnums=0)


def bits(x):
    return np.asarray(x).view(np.uint16)  # NaN equals NaN


def make_append(
    seed,
    *,
    b=3,
    s_new=5,
    h_kv=1,
    row=8,
    block_size=4,
    max_blocks=4,
    dtype=jnp.bfloat16,
    positions=None,
    num_new=None,
):
    """Every sequence in blocks of its own, and two blocks of nobody; all hold noise and NaN."""
    rng = np.random.default_rng(seed)
    num_blocks = b * max_blocks + 2
    blocks = rng.standard_normal((num_blocks, block_size, h_kv, row)).astype(dtype)
    blocks[rng.random(blocks.shape[:2]) < 0.3] = np.nan
    block_table = rng.permutation(num_blocks)[: b * max_blocks].reshape(b, max_blocks)
    if positions is None:
        positions = rng.integers(0, max_blocks * block_size, b)
    return Append(
        blocks,
        rng.standard_normal((b, s_new, h_kv, row)).astype(dtype),
        block_table.astype(np.int32),
        np.array(positions, np.int32),
        None if num_new is None else np.array(num_new, np.int32),
    )


@pytest.mark.parametrize(
    "dtype", [jnp.bfloat16, jnp.float16, jnp.float32], ids=["bf16", "f16", "f32"]
)
@pytest.mark.parametrize(
    "shape",
    [
        {"block_size": 64, "row": 576, "s_new": 1, "b": 6},
        {"block_size": 64, "row": 576, "s_new": 130},
        {"block_size": 64, "row": 576, "s_new": 3, "h_kv": 3},
        {"block_size": 1},
        {"block_size": 3, "row": 1, "h_kv": 1},
        {"block_size": 5, "row": 7, "h_kv": 3},
        {"block_size": 16, "row": 33, "h_kv": 2, "s_new": 40},
        {"block_size": 256, "row": 320, "max_blocks": 1, "s_new": 2},
        {"b": 1, "max_blocks": 1, "s_new": 1},
    ],
    ids=lambda shape: "-".join(f"{name}{size}" for name, size in shape.items()),
)
def test_rows_go_where_a_plain_loop_puts_them(implementation, shape, dtype):
    make_append(0, dtype=dtype, **shape).check(implementation)


@pytest.mark.parametrize(
    "positions",
    [
        [0, 3, 4],
        [11, 12, 15],  # the last rows are past the table's 16 tokens
        [16, 17, INT32_MAX],
        [-1, -4, -5],
        [INT32_MIN, INT32_MAX - 4, INT32_MAX - 1],
    ],
)
def test_rows_outside_the_table_are_dropped(implementation, positions):
    make_append(1, positions=positions).check(implementation)


@pytest.mark.parametrize("bad", [-1, 14, 15, 2147480000, INT32_MAX, INT32_MIN])
def test_rows_of_bad_block_ids_are_dropped(implementation, bad):
    append = make_append(2, positions=[0, 2, 6], s_new=9)
    assert len(append.blocks) == 14
    append.block_table[0, 0] = append.block_table[1, 1] = append.block_table[2] = bad
    append.check(implementation)


@pytest.mark.parametrize(
    "num_new", [[0, 0, 0], [5, 0, 2], [1, 4, 3], [6, 99, INT32_MAX], [-1, INT32_MIN, 5]]
)
def test_only_num_new_rows_are_written(implementation, num_new):
    make_append(3, positions=[2, 0, 14], num_new=num_new).check(implementation)


hostile = st.integers(-6, 22) | st.integers(INT32_MIN, INT32_MAX)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    positions=st.lists(hostile, min_size=3, max_size=3),
    num_new=st.lists(hostile, min_size=3, max_size=3),
    bad=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), hostile), max_size=4),
)
def test_hostile_values_never_reach_another_sequences_blocks(
    implementation, seed, positions, num_new, bad
):
    append = make_append(seed, positions=positions, num_new=num_new)
    for i, j, block in bad:
        append.block_table[i, j] = block if not 0 <= block < len(append.blocks) else -1
    append.check(implementation)


def test_without_donation_the_old_cache_stays(implementation):
    append = make_append(4)
    blocks = jnp.array(append.blocks)
    arrays = map(jnp.array, (append.rows, append.block_table, append.positions))
    after = cache_append(blocks, *arrays, implementation=implementation)
    np.testing.assert_array_equal(bits(blocks), bits(append.blocks))
    np.testing.assert_array_equal(bits(after), bits(append.expected()))


def test_vmap_over_caches_is_one_append_each(implementation):
    appends = [make_append(seed, num_new=[5, 2, 0]) for seed in range(4)]
    appends[1].block_table[0] = 14  # out of range, but a block of the next cache
    stacked = [
        jnp.stack([getattr(append, field.name) for append in appends])
        for field in dataclasses.fields(Append)
    ]

    def one(blocks, rows, block_table, positions, num_new):
        return cache_append(
            blocks, rows, block_table, positions, num_new=num_new, implementation=implementation
        )

    after = jax.vmap(one)(*stacked)
    expected = np.stack([append.expected() for append in appends])
    np.testing.assert_array_equal(bits(after), bits(expected))


# In place: the executable copies nothing of the cache's size, and gives the donated buffer back.

BLOCKS = (96, 64, 1, 576)  # 7 MB
XLA_DTYPE = jnp.float16  # jaxlib 0.10 on a CPU scatters bfloat16 by way of a float32 copy


def in_place_arguments(implementation):
    b, max_blocks = 4, 16
    dtype = jnp.bfloat16 if implementation == "kernel" else XLA_DTYPE
    return (
        jnp.zeros(BLOCKS, dtype),
        jnp.ones((b, 1, 1, 576), dtype),
        jnp.arange(b * max_blocks, dtype=jnp.int32).reshape(b, max_blocks),
        jnp.array([0, 63, 100, 1020], jnp.int32),
    )


def cache_copies(compiled, shape):
    """The instructions of the executable that make a new array of the cache's shape."""
    cache = rf"\w+\[{','.join(map(str, shape))}\]"
    return re.findall(rf"^.* = \(?{cache}\S* (?:copy|copy-start|convert)\(.*$", compiled, re.M)


def assert_in_place(function, cache, *arguments):
    """Compiles `function`, whose first argument is donated, and runs it; returns its result."""
    compiled = jax.jit(function, donate_argnums=0).lower(cache, *arguments).compile()
    assert cache_copies(compiled.as_text(), cache.shape) == []
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cache.nbytes
    assert memory.temp_size_in_bytes < cache.nbytes / 2
    pointer = cache.unsafe_buffer_pointer()
    result = compiled(cache, *arguments)
    assert result.unsafe_buffer_pointer() == pointer
    assert cache.is_deleted()
    return result


def test_append_is_in_place_when_donated(implementation):
    append = functools.partial(cache_append, implementation=implementation)
    assert_in_place(append, *in_place_arguments(implementation))


@pytest.mark.parametrize("loop", ["fori_loop", "scan", "scan of fori_loop"])
def test_append_is_in_place_inside_loops(implementation, loop):
    def step(i, carry, rows, block_table):
        blocks, positions = carry
        blocks = cache_append(
            blocks, rows + i, block_table, positions, implementation=implementation
        )
        return blocks, positions + 1

    def steps(blocks, rows, block_table, positions):
        def body(i, carry):
            return step(i.astype(rows.dtype), carry, rows, block_table)

        def layers(carry, i):
            return jax.lax.fori_loop(0, 2, lambda _, carry: body(i, carry), carry), None

        carry = blocks, positions
        numbers = jnp.arange(8, dtype=jnp.int32)
        if loop == "fori_loop":
            blocks, _ = jax.lax.fori_loop(0, 8, body, carry)
        elif loop == "scan":
            (blocks, _), _ = jax.lax.scan(lambda c, i: (body(i, c), None), carry, numbers)
        else:
            (blocks, _), _ = jax.lax.scan(layers, carry, numbers)
        return blocks

    blocks = assert_in_place(steps, *in_place_arguments(implementation))
    first = np.asarray(blocks[0, :8, 0, 0], np.float32)  # sequence 0 began at token 0
    expected = [1, 1, 2, 2, 3, 3, 4, 4] if loop == "scan of fori_loop" else range(1, 9)
    assert first.tolist() == list(expected)


def test_the_search_for_copies_finds_one(implementation):
    append = jax.jit(functools.partial(cache_append, implementation=implementation))
    compiled = append.lower(*in_place_arguments(implementation)).compile()  # not donated
    assert cache_copies(compiled.as_text(), BLOCKS) != []


def test_a_donated_cache_cannot_be_used_again(implementation):
    blocks, *arguments = in_place_arguments(implementation)
    jitted(implementation)(blocks, *arguments)
    with pytest.raises(ValueError, match="blocks must be a live array"):
        cache_append(blocks, *arguments, implementation=implementation)


@pytest.mark.parametrize(
    "dtype", [jnp.bfloat16, jnp.float16, jnp.float32], ids=["bf16", "f16", "f32"]
)
def test_copy_blocks(implementation, dtype):
    before = np.random.default_rng(0).standard_normal((8, 4, 2, 6)).astype(dtype)
    pairs = [(1, 2), (3, 1), (7, 0)]  # 1 is read and written
    src, dst = BlockAllocator.plan_copies(pairs, size=5)
    expected = before.copy()
    for from_block, to_block in pairs:
        expected[to_block] = before[from_block]
    blocks = jnp.array(before)
    after = copy_blocks(blocks, src, dst)
    np.testing.assert_array_equal(bits(after), bits(expected))
    assert blocks.is_deleted()


def test_copy_blocks_of_bad_ids_copies_nothing(implementation):
    before = np.random.default_rng(0).standard_normal((6, 2, 1, 4)).astype(jnp.bfloat16)
    src = np.array([-1, 6, INT32_MAX, 0, 0, 1, INT32_MIN], np.int32)
    dst = np.array([0, 1, 2, 6, -1, INT32_MIN, INT32_MAX], np.int32)
    after = copy_blocks(jnp.array(before), src, dst)
    np.testing.assert_array_equal(bits(after), bits(before))
    none = np.zeros(0, np.int32)
    np.testing.assert_array_equal(bits(copy_blocks(after, none, none)), bits(before))


def test_copy_blocks_is_in_place(implementation):
    src, dst = (jnp.array(ids, jnp.int32) for ids in ([1, 2, -1], [5, 6, -1]))
    blocks = jnp.zeros(BLOCKS, XLA_DTYPE).at[1].set(1)
    after = assert_in_place(copy_blocks, blocks, src, dst)
    assert (np.asarray(after[5]) == 1).all()


def append_with(**changes):
    append = dataclasses.replace(make_append(5, num_new=[1, 2, 3]), **changes)
    arrays = (append.blocks, append.rows, append.block_table, append.positions)
    return cache_append(*arrays, num_new=append.num_new)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"blocks": np.zeros((14, 4, 8), jnp.bfloat16)}, ValueError, r"blocks must have rank 4"),
        ({"blocks": np.zeros((14, 4, 1, 8), np.int8)}, TypeError, "blocks must have dtype.*int8"),
        ({"blocks": [1, 2]}, TypeError, "blocks must be an array"),
        ({"rows": np.zeros((3, 5, 8), jnp.bfloat16)}, ValueError, r"rows must have rank 4"),
        ({"rows": np.zeros((3, 5, 1, 8), np.float16)}, TypeError, "rows must have blocks' dtype"),
        ({"rows": np.zeros((3, 5, 2, 8), jnp.bfloat16)}, ValueError, r"rows must end in blocks'"),
        ({"rows": np.zeros((3, 5, 1, 9), jnp.bfloat16)}, ValueError, r"rows must end in blocks'"),
        ({"block_table": np.zeros((2, 4), np.int32)}, ValueError, "block_table must have one row"),
        (
            {"block_table": np.full((3, 4), 2**31)},
            ValueError,
            "block_table must fit in int32",
        ),
        ({"positions": np.zeros(2, np.int32)}, ValueError, "positions must have one entry"),
        ({"positions": np.zeros(3, bool)}, TypeError, "positions must have dtype int32.* got bool"),
        ({"num_new": np.zeros((3, 1), np.int32)}, ValueError, r"num_new must have rank 1"),
    ],
)
def test_wrong_arguments_of_append_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        append_with(**changes)


def test_unknown_implementation():
    with pytest.raises(ValueError, match=r"implementation must be .* got 'cuda'"):
        cache_append(*in_place_arguments("kernel"), implementation="cuda")


@pytest.mark.parametrize(
    ("blocks", "src", "dst", "error", "message"),
    [
        ((2, 3, 4), [0], [1], ValueError, r"blocks must have rank 4 .* got shape \(2, 3, 4\)"),
        ((2, 3, 1, 4), [[0]], [1], ValueError, r"src must have rank 1 \[n\], got shape \(1, 1\)"),
        ((2, 3, 1, 4), [0], [0.5], TypeError, "dst must have dtype int32, or .* got float32"),
        ((2, 3, 1, 4), [0], [1, 1], ValueError, r"dst must have src's shape \(1,\), got \(2,\)"),
    ],
)
def test_wrong_arguments_of_copy_are_named(blocks, src, dst, error, message):
    with pytest.raises(error, match=message):
        copy_blocks(jnp.zeros(blocks, jnp.bfloat16), jnp.array(src), jnp.array(dst))


def test_more_wrong_arguments_of_copy():
    ids = np.zeros(1, np.int32)
    with pytest.raises(TypeError, match=r"src must have dtype int32, or .* got float64"):
        copy_blocks(jnp.zeros(BLOCKS, jnp.bfloat16), [0.5], ids)
    with pytest.raises(
        TypeError, match="blocks must have dtype bfloat16, float16, float32 or uint8, got int32"
    ):
        copy_blocks(jnp.zeros(BLOCKS, jnp.int32), ids, ids)
    blocks = jnp.zeros(BLOCKS, jnp.bfloat16)
    copy_blocks(blocks, ids, ids)
    with pytest.raises(ValueError, match="blocks must be a live array, got one that was donated"):
        copy_blocks(blocks, ids, ids)
