"""Calls of FFI targets, past the package's own checks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_flashmla  # noqa: F401  (registers the targets)


def zeros(*shape, dtype=jnp.bfloat16):
    return np.zeros(shape, dtype)


def i32(*shape):
    return zeros(*shape, dtype=jnp.int32)


def result(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def call(target, operands, results, attributes, **options):
    outputs = jax.ffi.ffi_call(f"flashmla_{target}_v1", list(results.values()), **options)(
        *map(jnp.asarray, operands.values()), **attributes
    )
    return jax.block_until_ready(outputs)


def replaced(wrong, *groups):
    """Each group with the values of `wrong` in place; None takes an entry out."""
    known = {name for group in groups for name in group}
    new = {name: value for name, value in wrong.items() if name not in known}
    groups = [{name: wrong.get(name, value) for name, value in group.items()} for group in groups]
    groups[-1].update(new)  # superfluous attributes
    return [{k: v for k, v in group.items() if v is not None} for group in groups]


def refused(operation, match, **wrong):
    with pytest.raises(jax.errors.JaxRuntimeError, match=match):
        operation(**wrong)
