"""Layers over the devices of a mesh, in one process or several, against one device alone."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import layer_cases
import tolerances
from jax_flashmla import PagedCache, Peers
from jax_flashmla.bench.processes import put
from jax_flashmla.layers import MLAConfig, MLAParams, decode

CONFIGS = {
    "cpu": layer_cases.V3,
    "gpu": dataclasses.replace(  # dimensions that the Hopper kernels take
        layer_cases.V3,
        hidden_size=256,
        q_lora_rank=96,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
    ),
}
BLOCK_SIZES = {"cpu": 8, "gpu": 64}
LAYERS, B = 2, 4
STEPS = (2, 2)  # new tokens of each; alike, as each length is compiled
OPERATION = re.compile(r"= \(?(\w+\[[\d,]*\])\S* ([\w-]+)\(")  # result's type, name
MOVES = {"all-gather", "all-to-all", "collective-permute", "reduce-scatter", "copy"}

# A platform and how many of its devices a test takes.
DEVICES = [
    pytest.param(("cpu", 8), id="cpu-8"),
    *(pytest.param(("cuda", n), id=f"gpu-{n}", marks=pytest.mark.gpu) for n in (2, 4)),
]


def devices_of(platform: str, count: int) -> list[jax.Device]:
    """So many devices; the test is skipped where there are fewer."""
    devices = jax.devices(platform)
    if len(devices) < count:
        pytest.skip(f"needs {count} devices of {platform}, there are {len(devices)}")
    return devices[:count]


def make_mesh(devices: list[jax.Device], data: int = 1) -> Mesh:
    """[data, the rest]."""
    return Mesh(np.array(devices).reshape(data, -1), ("data", "model"))


def operations(hlo: str) -> list[tuple[str, str]]:
    return [(type_, name.removesuffix("-start")) for type_, name in OPERATION.findall(hlo)]


def make_caches(platform: str, shards: int) -> PagedCache:
    """The sequences' caches, each shard's ids counting from its own first block; all NaN."""
    config, block_size = CONFIGS[platform], BLOCK_SIZES[platform]
    parts = [
        layer_cases.make_cache(
            config, [sum(STEPS)] * (B // shards), layers=LAYERS, dtype="bfloat16",
            block_size=block_size,
        )
        for _ in range(shards)
    ]  # fmt: skip
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def layers(
    config: MLAConfig,
    axis: str | None,
    peers: Peers | None,
    params: MLAParams,
    cache: PagedCache,
    x: jax.Array,
) -> tuple[PagedCache, jax.Array]:
    cache, slots = cache.advance(x.shape[1])
    for i in range(LAYERS):
        cache, y = decode(
            config, params, x, cache, slots=slots, layer=i, heads_axis=axis, peers=peers
        )
        x = x + y
    return cache, x


class Layers:
    """Some layers with sequences over the mesh's "data" and heads over its "model"."""

    def __init__(self, mesh: Mesh, peers: Peers | None):
        platform = mesh.devices.flat[0].platform
        config = CONFIGS[platform]
        params = layer_cases.make_params(config, "bfloat16")
        cache = make_caches(platform, mesh.shape["data"])
        param_specs = MLAParams.specs(config, "model")
        cache_specs = jax.tree.map(lambda _: P("data"), cache)
        self.mesh, self.peers = mesh, peers
        self.params = put(params, mesh, param_specs)
        self.cache = put(cache, mesh, cache_specs)
        self._compiled: dict[tuple[int, ...], jax.stages.Compiled] = {}
        self._step = jax.jit(
            jax.shard_map(
                functools.partial(layers, config, "model", peers),
                mesh=mesh,
                in_specs=(param_specs, cache_specs, P("data")),
                out_specs=(cache_specs, P("data")),
            ),
            donate_argnums=1,
        )

    def run(self, x: np.ndarray) -> jax.Array:
        """All layers on x [B, tokens, hidden]."""
        arguments = self.params, self.cache, put(x, self.mesh, P("data"))
        if x.shape not in self._compiled:
            self._compiled[x.shape] = self._step.lower(*arguments).compile()
            self.assert_the_cache_stays(self._compiled[x.shape].as_text())
        self.cache, y = self._compiled[x.shape](*arguments)
        return y

    def assert_the_cache_stays(self, hlo: str) -> None:
        """And there is one sum a layer: over peer memory, or XLA's."""
        found = operations(hlo)
        names = [name for _, name in found]
        over_peers = self.peers is not None and self.peers.refusal is None
        split = self.mesh.shape["model"] > 1
        assert names.count("all-reduce") == (LAYERS if split and not over_peers else 0)
        assert not MOVES - {"copy"} & set(names)
        num_blocks, *rest = self.cache.blocks.shape
        local = (num_blocks // self.mesh.shape["data"], *rest)
        of_cache = {name for type_, name in found if type_ == f"bf16[{','.join(map(str, local))}]"}
        assert of_cache & {"custom-call", "get-tuple-element"}  # the types are those looked for
        assert not of_cache & MOVES


@functools.cache
def alone(device: jax.Device) -> list[np.ndarray]:
    """What one device makes of the same steps."""
    config = CONFIGS[device.platform]
    step = jax.jit(functools.partial(layers, config, None, None))
    outs = []
    with jax.default_device(device):
        params = layer_cases.make_params(config, "bfloat16")
        cache = jax.tree.map(jnp.asarray, make_caches(device.platform, 1))
        for tokens in STEPS:
            x = layer_cases.make_x(config, B, tokens, "bfloat16")
            cache, out = step(params, cache, jnp.asarray(x))
            outs.append(np.asarray(out))
    return outs


def check_layers(mesh: Mesh, peers: Peers | None) -> None:
    """Some steps, each shard that this process has against its first device alone."""
    parallel = Layers(mesh, peers)
    device = next(d for d in mesh.devices.flat if d.process_index == jax.process_index())
    for tokens, expected in zip(STEPS, alone(device), strict=True):
        x = layer_cases.make_x(CONFIGS[device.platform], B, tokens, "bfloat16")
        copies: dict[str, np.ndarray] = {}
        for shard in parallel.run(x).addressable_shards:
            mine = np.asarray(shard.data)
            tolerances.assert_close("x", mine, expected[shard.index], tolerances.BF16_LAYER)
            first = copies.setdefault(str(shard.index), mine)
            np.testing.assert_array_equal(first.view(np.uint16), mine.view(np.uint16))


def check_moves(mesh: Mesh) -> None:
    """A sequence's blocks from the first share of a cache over "data" to its last, by the host."""
    shares = mesh.shape["data"]
    cache = make_caches(mesh.devices.flat[0].platform, shares)
    blocks = np.asarray(cache.blocks)
    numbers = np.arange(len(blocks)).reshape(-1, *[1] * (blocks.ndim - 1))
    blocks = np.broadcast_to(numbers, blocks.shape).astype(blocks.dtype)
    cache = put(
        dataclasses.replace(cache, blocks=blocks), mesh, jax.tree.map(lambda _: P("data"), cache)
    )
    kept = jax.device_get(cache.get_sequence([3, 0], shard=(0, shares)))
    of_layer = len(blocks) // (shares * LAYERS)
    taken = of_layer * np.arange(LAYERS)[:, None] + np.array([3, 0])
    np.testing.assert_array_equal(kept.blocks, blocks[taken])
    after = cache.insert_sequences([kept], [[1, 2]], shard=(shares - 1, shares))
    expected = blocks.copy()
    to = of_layer * (LAYERS * (shares - 1) + np.arange(LAYERS)[:, None]) + np.array([1, 2])
    expected[to] = blocks[taken]
    for shard in after.blocks.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), expected[shard.index])
