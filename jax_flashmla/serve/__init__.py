"""A server over one paged cache: continuous batching, prefix caching, speculation, streaming."""

from jax_flashmla.serve.draft import NGramDraft as NGramDraft
from jax_flashmla.serve.model import Model as Model
from jax_flashmla.serve.request import Stats as Stats
from jax_flashmla.serve.request import Token as Token
from jax_flashmla.serve.sampling import Sampling as Sampling
from jax_flashmla.serve.sampling import sample as sample
from jax_flashmla.serve.server import Server as Server
