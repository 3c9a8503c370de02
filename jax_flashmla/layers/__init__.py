"""Multi-head latent attention layers over the paged cache: a functional core, and Flax modules.

The modules are `jax_flashmla.layers.nnx.MLAttention` and `jax_flashmla.layers.linen.MLAttention`.
"""

from jax_flashmla.layers.absorb import AbsorbedWeights as AbsorbedWeights
from jax_flashmla.layers.absorb import absorb as absorb
from jax_flashmla.layers.config import IndexerConfig as IndexerConfig
from jax_flashmla.layers.config import LongRopeConfig as LongRopeConfig
from jax_flashmla.layers.config import MLAConfig as MLAConfig
from jax_flashmla.layers.config import RopeConfig as RopeConfig
from jax_flashmla.layers.config import YarnConfig as YarnConfig
from jax_flashmla.layers.decode import decode as decode
from jax_flashmla.layers.indexer import Selection as Selection
from jax_flashmla.layers.indexer import select as select
from jax_flashmla.layers.params import MLAParams as MLAParams
from jax_flashmla.layers.prefill import prefill as prefill
