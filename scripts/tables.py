"""Update the tables and figures of the documents from the committed rows in experiments/results.

  python -m scripts.tables           # writes README.md, experiments/README.md, docs/*.md, and
                                     # docs/pictures
  python -m scripts.tables --check   # writes nothing; exit code 2 if anything would change

The text between `<!-- table: FILE.KIND -->` and `<!-- /table -->` is replaced by a table of the
rows in experiments/results/FILE.jsonl. KIND is a comparison that an experiment file declares
(rates, metrics, schedules, ...), quality (all variants), other (variants of no comparison), cost or
losses. For rows of benchmarks it is steps or memory, and for rows of evaluations perplexity,
choices, answers or harness. Filters may follow: prefixes of a text field, or values of a number
field, of which a row must match one for each field:
`<!-- table: runs.rates twin=1c393d steps=48,40 optimizer.learning_rate=3e-4 -->`.
"""

from pathlib import Path

from sat_jax.cli import Parser, run
from sat_jax.errors import UserError

PICTURES = Path("docs") / "pictures"
RESULTS = Path("experiments") / "results"
_ROOT = Path(__file__).resolve().parents[1]


def parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser("tables", __doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing, report what is outdated"
    )
    return parser


def main() -> None:
    """Write the documents and figures, or check them."""
    options = parser().parse_args()
    from sat_jax.results.documents import outdated, outdated_pictures, pictures
    from sat_jax.results.sweep import declared_comparisons

    changed = outdated(_ROOT, _ROOT / RESULTS, declared_comparisons(_ROOT / "experiments"))
    if options.check:
        old = [*changed, *outdated_pictures(_ROOT / RESULTS, _ROOT / PICTURES)]
        names = ", ".join(str(path.relative_to(_ROOT)) for path in old)
        if old:
            raise UserError(f"outdated: {names}; run: make tables")
        return
    for path, text in changed.items():
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(_ROOT))
    for path in pictures(_ROOT / RESULTS, _ROOT / PICTURES):
        print(path.relative_to(_ROOT))


if __name__ == "__main__":
    run(main)
