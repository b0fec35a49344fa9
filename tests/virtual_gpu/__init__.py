"""A GPU without a GPU, for the tests marked ``cuda``: docs/virtual-gpu.md says what it is and what it cannot show."""
