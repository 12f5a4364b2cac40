"""Retention in chunks; `api` describes the function."""

from kernels.retention.api import IMPLEMENTATIONS, refusal, retention
from kernels.retention.reference import Operands, Times
from kernels.retention.reference import retention as parallel_retention
from kernels.retention.xla import absolute_retention

__all__ = [
    "IMPLEMENTATIONS",
    "Operands",
    "Times",
    "absolute_retention",
    "parallel_retention",
    "refusal",
    "retention",
]
