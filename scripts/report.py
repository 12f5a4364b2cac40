"""Tables and pictures of finished runs: one HTML page, and the tables as Markdown, LaTeX and CSV.

  python -m scripts.report runs/rates
  python -m scripts.report runs/x runs/y --rows experiments/results/runs.jsonl --out report

A table is there where runs for it are: those that differ in its settings alone (and in their seed,
over which it has means). Runs are compared with the dense run of the same settings, seed and data.
What `scripts.evaluate --record` found stands in tables of its own. The page needs nothing else:
its pictures are inside it.
"""

import sys
from pathlib import Path

from sat_jax.cli import Parser, run
from sat_jax.errors import UserError


def parser() -> Parser:
    """What the command line takes."""
    made = Parser("report", __doc__)
    add = made.add_argument
    add("folders", nargs="*", type=Path, metavar="DIR", help="work directory of a run or a sweep")
    add("--rows", action="append", default=[], type=Path, metavar="FILE",
        help="a .jsonl file of rows that --record wrote, of runs or of evaluations; may be given"
        " several times")  # fmt: skip
    add("--out", default=Path("report"), type=Path, metavar="OUT",
        help="folder of what is written; default report")  # fmt: skip
    return made


def main() -> None:
    """From runs to a page."""
    given = parser().parse_args()
    if not given.folders and not given.rows:
        raise UserError("nothing to report on; accepted: DIR, or --rows FILE")
    from sat_jax.report.collect import collect, evaluations
    from sat_jax.report.page import write_report

    records = collect(given.folders, given.rows, lambda line: print(line, file=sys.stderr))
    for path in write_report(records, given.out, evaluations(given.rows)):
        print(path)


if __name__ == "__main__":
    run(main)
