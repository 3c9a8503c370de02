"""Everything that knows how JAX calls the handlers."""
