"""Mesh axes over which arrays are split by hand, where the compiler cannot split an operation."""

ROW_AXES, GROUP_AXES = ("data", "fsdp"), ("tensor",)
