"""Mesh axes over which arrays are split by hand, where the compiler cannot split an operation."""

PIPELINE, TENSOR = "pipeline", "tensor"
ROW_AXES, GROUP_AXES = (PIPELINE, "data", "fsdp"), (TENSOR,)
