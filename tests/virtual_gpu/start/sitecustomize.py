"""Python imports this at its start, being the first of its name on PYTHONPATH (see virtual_gpu.run)."""

from virtual_gpu.hooks import install

install()
