"""Block-sparse kernels, importable on their own: nothing here knows of sat_jax."""
