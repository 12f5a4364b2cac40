"""The quickstart on Metamath theorems, where perplexity decreases more: it halves in minutes.

    python -m scripts.train --config=experiments/metamath.py --config.data.sources=PATH \
        --workdir=runs/metamath

PATH is a text file of theorems (its end is held out) or JSON lines (some theorems are held out);
experiments/README.md names the source.
"""

from ml_collections import ConfigDict

from experiments import quickstart


def get_config(variant: str = "sat") -> ConfigDict:
    """Variants: `sat`, and `dense`, the same run without SAT."""
    config = quickstart.get_config(variant)
    config.data.sources = ()
    return config
