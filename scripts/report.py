"""Write a report on finished runs: an HTML page with figures and tables, and Markdown tables.

  python -m scripts.report runs/rates
  python -m scripts.report runs/x runs/y experiments/results/runs.jsonl --out report

The page shows quality against cost, a sentence for each variant, and a table for each comparison
that a sweep or an experiment file declares, with means over seeds. Each run is compared with its
dense baseline: the dense run of the same settings, seed and data. Rows of `scripts.evaluate
--record` have separate tables. The page is a single self-contained file.
"""

import sys
from pathlib import Path

from sat_jax.cli import Parser, run

_EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"


def parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser("report", __doc__)
    add = parser.add_argument
    add("paths", nargs="+", type=Path, metavar="PATH",
        help="work directory of a run or a sweep, or a .jsonl file of --record")  # fmt: skip
    add("--out", default=Path("report"), type=Path, metavar="OUT",
        help="folder for report.html and tables.md; default report")  # fmt: skip
    return parser


def main() -> None:
    """Read the runs and write the page."""
    options = parser().parse_args()
    from sat_jax.results.finished import collect
    from sat_jax.results.page import write_report
    from sat_jax.results.sweep import declared_comparisons

    rows, comparisons = collect(options.paths, lambda line: print(line, file=sys.stderr))
    if any(map(Path.is_file, options.paths)):
        comparisons += declared_comparisons(_EXPERIMENTS)
    for path in write_report(rows, comparisons, options.out):
        print(path)


if __name__ == "__main__":
    run(main)
