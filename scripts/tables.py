"""Update the tables and the pictures of the documents from the rows in experiments/results.

  python -m scripts.tables           # writes README.md, experiments/README.md, docs/*.md,
                                     # docs/pictures/study.png and, from the rows of `benchmark
                                     # --only retention` and of experiments/table_context.py,
                                     # docs/pictures/retention.png and context.png
  python -m scripts.tables --check   # writes nothing; exit code 2 if anything would change

Both end with exit code 2 if a number in a sentence of README.md or docs/study.md is in no table of
that document, or one of docs/sparsity.md in none of docs/study.md. sat_jax/results/claims.py says
which numbers are checked.

The text between `<!-- table: FILE.KIND -->` and `<!-- /table -->` is replaced by a table of the
rows in experiments/results/FILE.jsonl. KIND is a comparison that an experiment file declares
(rates, metrics, schedules, ...), the same with _paired (differences from the variant of the same
rate, seed by seed), quality (all variants), other (variants of no comparison), cost, losses or
held_out. For rows of benchmarks it is steps, peer, blocks, moves, retention_training,
retention_decoding or memory, and for those of evaluations perplexity, context, positions
(means over seeds, of models trained from scratch), passkey, extension (of contexts, by scaling of
rotary positions), choices, answers or harness. For compressed models it is compression.
Filters may follow: prefixes of a text field, or values of a number field, of which a row must match
one for each field or setting:
`<!-- table: runs.rates twin=1c393d steps=48,40 optimizer.learning_rate=3e-4 -->`.
"""

from pathlib import Path

from sat_jax.cli import Parser, run
from sat_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "experiments" / "results"
DOCS = ROOT / "docs"
CLAIMS: dict[Path, tuple[Path, ...]] = {  # and the documents whose tables they quote
    ROOT / "README.md": (),
    DOCS / "study.md": (),
    DOCS / "sparsity.md": (DOCS / "study.md",),
}
PICTURES = (
    (RESULTS / "study.jsonl", DOCS / "pictures" / "study.png"),
    (RESULTS / "benchmark.jsonl", DOCS / "pictures" / "retention.png"),
    (RESULTS / "context.jsonl", DOCS / "pictures" / "context.png"),
    (RESULTS / "compression.jsonl", DOCS / "pictures" / "compression.png"),
)


def parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser("tables", __doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing, report what is outdated"
    )
    return parser


def main() -> None:
    """Write the documents and the pictures, or check them."""
    options = parser().parse_args()
    from sat_jax.results.claims import unsupported
    from sat_jax.results.documents import draw, is_outdated, outdated
    from sat_jax.results.sweep import declared_comparisons

    changed = outdated(ROOT, RESULTS, declared_comparisons(ROOT / "experiments"))
    drawn = [pair for pair in PICTURES if is_outdated(*pair)]
    names = [str(path.relative_to(ROOT)) for path in (*changed, *(picture for _, picture in drawn))]
    if options.check and names:
        raise UserError(f"outdated: {', '.join(names)}; run: make tables")
    for path, text in changed.items():
        path.write_text(text, encoding="utf-8")
    for pair in drawn:
        draw(*pair)
    for name in names:
        print(name)
    findings = [
        f"{path.relative_to(ROOT)}:{line}: {why}"
        for path, quoted in CLAIMS.items()
        for line, why in unsupported(*(p.read_text(encoding="utf-8") for p in (path, *quoted)))
    ]
    if findings:
        print("\n".join(findings))
        raise UserError(f"numbers in sentences that are in no table: {len(findings)}, listed above")


if __name__ == "__main__":
    run(main)
