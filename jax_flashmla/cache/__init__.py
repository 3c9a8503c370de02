"""A model's paged cache: formats, tables, pools, and who owns which block."""
