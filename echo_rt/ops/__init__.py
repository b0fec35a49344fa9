"""The operations: their schema, the backends that implement them, and what is computed beside them."""
