"""Block-sparse kernels and retention: a package that does not depend on sat_jax."""
