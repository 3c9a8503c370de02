"""Loading attention weights, under the name that is documented."""

from jax_flashmla.layers.hf.checkpoint import attention_prefix as attention_prefix
from jax_flashmla.layers.hf.checkpoint import attention_shapes as attention_shapes
from jax_flashmla.layers.hf.checkpoint import load_attention as load_attention
from jax_flashmla.layers.hf.checkpoint import track as track
