"""Block-sparse kernels: a package that does not depend on sat_jax."""
