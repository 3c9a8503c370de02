"""Reading tensors of checkpoints, under the name that is documented."""

from jax_flashmla.layers.hf.tensor_reader import StoredTensor as StoredTensor
from jax_flashmla.layers.hf.tensor_reader import TensorReader as TensorReader
