"""Golden tensors of GPT-2 and GPT-NeoX."""

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

GOLDEN = Path(__file__).parent / "golden"


def stored(name: str) -> dict[str, np.ndarray]:
    return load_file(GOLDEN / name / "model.safetensors")
