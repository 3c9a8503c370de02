"""Paged multi-head latent attention (MLA) decoding for JAX, on CPUs and on Hopper GPUs."""

from jax_flashmla.cache.allocator import BlockAllocator as BlockAllocator
from jax_flashmla.cache.allocator import OutOfBlocks as OutOfBlocks
from jax_flashmla.cache.copy import copy_blocks as copy_blocks
from jax_flashmla.cache.format import CacheFormat as CacheFormat
from jax_flashmla.cache.paged import PagedCache as PagedCache
from jax_flashmla.cache.table import BlockTable as BlockTable
from jax_flashmla.cache.table import Slots as Slots
from jax_flashmla.compat import flash_mla_with_kvcache as flash_mla_with_kvcache
from jax_flashmla.compat import get_mla_metadata as get_mla_metadata
from jax_flashmla.export import export_checks as export_checks
from jax_flashmla.ops.cache_append import cache_append as cache_append
from jax_flashmla.ops.dense_decode import dense_decode as dense_decode
from jax_flashmla.ops.dense_decode import kernel_refusal as kernel_refusal
from jax_flashmla.ops.make_schedule import SplitSchedule as SplitSchedule
from jax_flashmla.ops.make_schedule import make_schedule as make_schedule
from jax_flashmla.ops.merge import merge_lse as merge_lse
from jax_flashmla.sharding import decode_specs as decode_specs

__version__ = "0.1.0"
