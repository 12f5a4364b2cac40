"""The quickstart's model on Metamath's theorems: a stronger signal, perplexity halves in minutes.

    python -m scripts.train --config=experiments/metamath.py --config.data.sources=PATH \
        --workdir=runs/metamath

PATH is a text file of theorems (its end is held out) or a JSON-lines file (whole theorems are);
experiments/README.md says where anyone gets it.
"""

from ml_collections import ConfigDict

from experiments import quickstart


def get_config(variant: str = "sat") -> ConfigDict:
    """Variants: `sat`, and `dense`, the same run without SAT."""
    config = quickstart.get_config(variant)
    config.data.sources = ()
    return config
