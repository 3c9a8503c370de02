"""Pure-JAX twins of the operations: the same semantics, differentiable, on any platform.

They are what runs where there is no kernel, and the tests' second opinion where there is one.
"""
