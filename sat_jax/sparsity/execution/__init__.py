"""How a sparse step is computed: gathered rows, masks, kernels, or a choice inside each layer."""
