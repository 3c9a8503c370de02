"""`python -m jax_flashmla.cli`, the same as `jax-flashmla`."""

import sys

from jax_flashmla.cli import main

sys.exit(main())
