"""The parameters of a latent attention layer, as a pytree of arrays."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jax_flashmla import _checks
from jax_flashmla.layers import jax_llm_examples, maxtext
from jax_flashmla.layers.config import MLAConfig

if TYPE_CHECKING:
    from jax.typing import DTypeLike


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class MLAParams:
    """The parameters, each an array or None where the layer has none.

    Also the container of what describes them one by one: shapes, partition specs.

    Args:
        w_q: query projection [hidden, heads, nope + rope], where q_lora_rank is None.
        w_dq: query down-projection [hidden, q_lora_rank].
        q_norm: weight of its RMSNorm [q_lora_rank].
        w_uq: query up-projection [q_lora_rank, heads, nope + rope].
        w_dkv: projection to the latent and the shared rotary key [hidden, kv_lora_rank + rope].
        kv_norm: weight of the latent's RMSNorm [kv_lora_rank].
        w_uk: key up-projection [heads, nope, kv_lora_rank].
        w_uv: value up-projection [heads, v, kv_lora_rank].
        w_o: output projection [heads, v, hidden].
        index_w_q: the indexer's query projection [q_lora_rank, index_heads, head_dim].
        index_w_k: its key projection [hidden, head_dim].
        index_k_norm: weight of the LayerNorm of its keys [head_dim].
        index_k_bias: bias of that [head_dim].
        index_w_weights: projection to the weights of its heads [hidden, index_heads], float32
            whatever the others are.
    """

    w_q: Any = None
    w_dq: Any = None
    q_norm: Any = None
    w_uq: Any = None
    w_dkv: Any
    kv_norm: Any
    w_uk: Any
    w_uv: Any
    w_o: Any
    index_w_q: Any = None
    index_w_k: Any = None
    index_k_norm: Any = None
    index_k_bias: Any = None
    index_w_weights: Any = None

    @staticmethod
    def init(config: MLAConfig, key: jax.Array, dtype: DTypeLike = jnp.float32) -> MLAParams:
        """Norms of ones, and projections from a normal distribution of variance 1 / inputs.

        Args:
            config: the layer.
            key: a key of `jax.random`.
            dtype: of the arrays.

        Raises:
            TypeError: a config that is none, or a dtype that is not floating.
        """
        check_layer(config, dtype=dtype)
        return _init(config, key, jnp.dtype(dtype))

    @staticmethod
    def shapes(config: MLAConfig, dtype: DTypeLike = jnp.float32) -> MLAParams:
        """A `jax.ShapeDtypeStruct` for each array."""
        return _map_fields(
            config, lambda name, shape, _: jax.ShapeDtypeStruct(shape, stored_dtype(name, dtype))
        )

    @staticmethod
    def specs(config: MLAConfig, heads: str | None) -> MLAParams:
        """A `PartitionSpec` for each array: heads over the mesh axis `heads`, the rest unsplit.

        The indexer's heads are not split: each device selects for itself, without communication.
        """

        def spec(name: str, shape: tuple[int, ...], _: int) -> PartitionSpec:
            return PartitionSpec(*(heads if axis == "heads" else None for axis in AXES[name]))

        return _map_fields(config, spec)

    @staticmethod
    def from_maxtext(
        config: MLAConfig, weights: Mapping[str, Any], *, dtype: DTypeLike = jnp.bfloat16
    ) -> MLAParams:
        """The parameters of a latent attention layer of MaxText.

        Args:
            config: the layer; docs/integrations.md has its fields in MaxText's terms.
            weights: the parameters of the layer's `self_attention`, nested dicts of unboxed arrays:
                `{"wkv_a": {"kernel": [hidden, kv_lora_rank + rope]}, ...}`. Without an indexer in
                config, an indexer's are passed over.
            dtype: of the parameters.

        Raises:
            TypeError: weights are no dict, or not of arrays.
            ValueError: it names every array that is missing, extra or misshapen.
        """
        return _from_fields(config, maxtext.from_maxtext, weights, dtype)

    def to_maxtext(self) -> dict[str, Any]:
        """The parameters as MaxText nests them, in their own dtypes; see `from_maxtext`."""
        return maxtext.to_maxtext(vars(self))

    @staticmethod
    def from_jax_llm_examples(
        config: MLAConfig, layer: Any, *, dtype: DTypeLike = jnp.bfloat16
    ) -> MLAParams:
        """The parameters of an attention layer of jax-llm-examples (deepseek_r1_jax).

        Args:
            config: the layer; docs/integrations.md has its fields in that project's terms.
            layer: its `AttentionLayer`, or a dict of the arrays by name. Arrays of int8 with scales
                (`QuantArray`) are multiplied by them, in float32.
            dtype: of the parameters.

        Raises:
            TypeError: the layer is something else, or not of arrays.
            ValueError: a config without q_lora_rank or with an indexer; or it names every array
                that is missing, extra or misshapen.
        """
        return _from_fields(config, jax_llm_examples.from_jax_llm_examples, layer, dtype)

    def to_jax_llm_examples(self) -> dict[str, Any]:
        """The arrays of jax-llm-examples' `AttentionLayer` by name, unquantised, in their dtypes.

        Raises:
            ValueError: a layer without q_lora_rank or with an indexer: there is none there.
        """
        return jax_llm_examples.to_jax_llm_examples(vars(self))


AXES = {
    "w_q": ("hidden", "heads", "qk"),
    "w_dq": ("hidden", "q_rank"),
    "q_norm": ("q_rank",),
    "w_uq": ("q_rank", "heads", "qk"),
    "w_dkv": ("hidden", "row"),
    "kv_norm": ("kv_rank",),
    "w_uk": ("heads", "nope", "kv_rank"),
    "w_uv": ("heads", "v", "kv_rank"),
    "w_o": ("heads", "v", "hidden"),
    "index_w_q": ("q_rank", "index_heads", "index_dim"),
    "index_w_k": ("hidden", "index_dim"),
    "index_k_norm": ("index_dim",),
    "index_k_bias": ("index_dim",),
    "index_w_weights": ("hidden", "index_heads"),
}
_INPUTS = {
    "w_q": (0,),
    "w_dq": (0,),
    "w_uq": (0,),
    "w_dkv": (0,),
    "w_uk": (2,),
    "w_uv": (2,),
    "w_o": (0, 1),
    "index_w_q": (0,),
    "index_w_k": (0,),
    "index_w_weights": (0,),
}  # of each projection, the axes that are summed over


def initializer(name: str) -> Callable[..., jax.Array]:
    """`init(key, shape, dtype)` of one parameter."""
    if name in ("q_norm", "kv_norm", "index_k_norm"):
        return jax.nn.initializers.ones
    if name == "index_k_bias":
        return jax.nn.initializers.zeros

    def init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
        fan_in = math.prod(shape[axis] for axis in _INPUTS[name])
        numbers = jax.random.normal(key, shape, jnp.float32) * fan_in**-0.5
        return numbers.astype(dtype)

    return init


def stored_dtype(name: str, dtype: DTypeLike) -> DTypeLike:
    """What a parameter is stored in where the others are of `dtype`."""
    return jnp.float32 if name == "index_w_weights" else dtype


def check_layer(config: Any, **dtypes: Any) -> None:
    """That config is one, and each of the dtypes, which are named as the user names them."""
    if not isinstance(config, MLAConfig):
        raise TypeError(f"config must be an MLAConfig, got {type(config).__name__}")
    for name, dtype in dtypes.items():
        try:
            floating = dtype is not None and jnp.issubdtype(dtype, jnp.floating)
        except TypeError:
            floating = False
        if not floating:
            raise TypeError(f"{name} must be floating, got {dtype}")


def check_params(config: MLAConfig, params: MLAParams, num_heads: int) -> None:
    """That every array has the config's shape, but for heads, of which there are num_heads."""
    if not isinstance(params, MLAParams):
        raise TypeError(f"params must be MLAParams, got {type(params).__name__}")
    expected = MLAParams.shapes(dataclasses.replace(config, num_heads=num_heads))
    wrong = []
    for field in dataclasses.fields(MLAParams):
        if getattr(params, field.name) is not None:
            dims = f"[{', '.join(AXES[field.name])}]"
            _checks.refuse_foreign(f"params.{field.name}", getattr(params, field.name), dims)
    for field in dataclasses.fields(MLAParams):
        want, got = getattr(expected, field.name), getattr(params, field.name)
        want_shape = None if want is None else want.shape
        got_shape = None if got is None else tuple(got.shape)
        if want_shape != got_shape:
            wrong.append(f"params.{field.name} must be {want_shape}, got {got_shape}")
    if wrong:
        raise ValueError("; ".join(wrong))


@functools.partial(jax.jit, static_argnames=("config", "dtype"))  # one compilation, not nine
def _init(config: MLAConfig, key: jax.Array, dtype: np.dtype) -> MLAParams:
    def init_array(name: str, shape: tuple[int, ...], index: int) -> jax.Array:
        key_of = jax.random.fold_in(key, index)
        return initializer(name)(key_of, shape, stored_dtype(name, dtype))

    return _map_fields(config, init_array)


def _from_fields(
    config: MLAConfig,
    read: Callable[[MLAConfig, Any], dict[str, Any]],
    weights: Any,
    dtype: DTypeLike,
) -> MLAParams:
    check_layer(config, dtype=dtype)
    fields = read(config, weights)
    return MLAParams(**{name: x.astype(stored_dtype(name, dtype)) for name, x in fields.items()})


def _map_fields(config: MLAConfig, make: Callable[[str, tuple[int, ...], int], Any]) -> MLAParams:
    """make(name, shape, index) for each array that the config's layer has."""
    check_layer(config)
    direct = config.q_lora_rank is None
    sizes = {
        "hidden": config.hidden_size,
        "heads": config.num_heads,
        "q_rank": config.q_lora_rank or 0,
        "kv_rank": config.kv_lora_rank,
        "nope": config.qk_nope_head_dim,
        "qk": config.qk_nope_head_dim + config.qk_rope_head_dim,
        "v": config.v_head_dim,
        "row": config.d_qk,
        "index_heads": 0 if config.indexer is None else config.indexer.num_heads,
        "index_dim": 0 if config.indexer is None else config.indexer.head_dim,
    }
    unused: tuple[str, ...] = ("w_dq", "q_norm", "w_uq") if direct else ("w_q",)
    if config.indexer is None:
        unused += tuple(name for name in AXES if name.startswith("index_"))
    return MLAParams(
        **{
            name: make(name, tuple(sizes[axis] for axis in axes), index)
            for index, (name, axes) in enumerate(AXES.items())
            if name not in unused
        }
    )
