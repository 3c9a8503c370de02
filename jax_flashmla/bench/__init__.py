"""`jax-flashmla bench`: times an operation over a grid of shapes and says what that is worth.

Each operation has a folder of its own (`dense_decode/`): its shapes and grids, its calls, what is
recorded of its peers. `operation` says what such a folder gives; `operations` lists them. The rest
knows none of them: `options` declares the command line; `run` measures what it asks for: it has the
programs of several shapes compiled at once (`ahead`), then measures these a shape at a time
(`measure_shape`, `measure`); `document` keeps and reads the results as JSON, `resume` goes on with
them; `report` and `plots` show them.
"""
