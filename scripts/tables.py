"""Makes the marked tables of the documents anew from the committed rows in experiments/results.

  python -m scripts.tables           # writes README.md, experiments/README.md, docs/*.md, and
                                     # docs/pictures
  python -m scripts.tables --check   # writes nothing; exit code 2 where one would change

What is between `<!-- table: FILE.KIND -->` and `<!-- /table -->` is replaced, by a table of the
rows in experiments/results/FILE.jsonl. KIND is rates, metrics, schedules, refresh, modules,
moments, others, sft, losses or efficiency; steps, memory, speed or kernels of the benchmarks;
perplexity, choices, answers or harness of evaluations. Behind it may stand what a row's fields have
to start with, or as numbers equal:
`<!-- table: runs.rates twin=1c393d steps=48,40 optimizer.learning_rate=3e-4 -->`.
"""

from pathlib import Path

from sat_jax.cli import Parser, run
from sat_jax.errors import UserError

PICTURES = Path("docs") / "pictures"
_ROOT = Path(__file__).resolve().parents[1]


def parser() -> Parser:
    """What the command line takes."""
    made = Parser("tables", __doc__)
    made.add_argument("--check", action="store_true", help="write nothing, tell what would change")
    return made


def main() -> None:
    """All documents at once: either each can be made, or none is written."""
    given = parser().parse_args()
    from sat_jax.report.documents import RESULTS, outdated
    from sat_jax.report.pictures import outdated_pictures, pictures

    changed = outdated(_ROOT)
    if given.check:
        old = [*changed, *outdated_pictures(_ROOT / RESULTS, _ROOT / PICTURES)]
        names = ", ".join(str(path.relative_to(_ROOT)) for path in old)
        if old:
            raise UserError(f"not what the rows make of them: {names}; run: make tables")
        return
    for path, text in changed.items():
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(_ROOT))
    for path in pictures(_ROOT / RESULTS, _ROOT / PICTURES):
        print(path.relative_to(_ROOT))


if __name__ == "__main__":
    run(main)
