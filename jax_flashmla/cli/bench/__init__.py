"""`jax-flashmla bench`: times dense_decode over a grid of shapes and says what that is worth.

`options` declares the command line; `run` measures what it asks for; `document` keeps and reads the
results as JSON; `report` and `plots` show them.
"""
