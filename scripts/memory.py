"""Compute the memory of large models' training steps, compiled for an absent accelerator.

  .venv-aot/bin/python -m scripts.memory --target h200 --model llama-2-7b --rows 4

Rows have the sizes, from XLA's memory analysis, of the state that is trained (parameters and
moments), of the omitted state, of temporaries (gradients, activations, copies), and the peak memory
of a refresh while it converts the state. Attention is in plain XLA, since cuDNN's needs a device to
compile; with cuDNN's the temporaries are smaller. `make memory` computes the committed rows. A case
that has a row of this commit is skipped.
"""

import functools
from pathlib import Path
from typing import Any

import kernels.aot as aot  # first, since it configures jax for absent devices
from sat_jax.cli import Parser, run
from sat_jax.errors import UserError
from sat_jax.train.step_program import refresh_bytes
from scripts.efficiency import (
    Case,
    Row,
    add_case_options,
    add_rows,
    cases_of,
    check_sizes,
    describe,
    make_program,
    optimizer_of,
)

_OUT = Path("experiments/results/memory.jsonl")


def parser() -> Parser:
    """Return the parser of the command line."""
    result = Parser("memory", __doc__)
    add_case_options(result)
    add = result.add_argument
    add("--target", default="h200", help=f"the accelerator: {', '.join(aot.TARGETS)}; default h200")
    add("--out", type=Path, default=_OUT, metavar="FILE", help="JSON lines, appended to")
    return result


def main() -> None:
    """Compile the cases that have no row."""
    args = parser().parse_args()
    if args.target not in aot.TARGETS:
        raise UserError(f"--target {args.target}; accepted: {', '.join(aot.TARGETS)}")
    if reason := aot.compiler_error(args.target):
        raise UserError(f"--target {args.target}: {reason}; `make memory` installs its compiler")
    model = check_sizes(args, "rows", "row_length")
    memory_of = functools.partial(aot.memory, args.target)

    def analyse(case: Case) -> Row:
        execution, program = make_program(model, case, args, args.attention or "xla")
        memory = memory_of(program.function, program[1:])
        row = describe(execution, program, args)
        row |= {
            "state_bytes": memory.argument_size_in_bytes,
            "temporary_bytes": memory.temp_size_in_bytes,
        }
        if case.execution == "gather":
            row["refresh_bytes"] = refresh_bytes(execution, optimizer_of(args), memory_of)
        return row

    for row in add_rows(args.out, args, args.target, list(cases_of("step", args)), analyse):
        print(
            f"{row['model']}  {row['execution']}  r = {row['rate']:g}: {_summary(row)}", flush=True
        )


def _summary(row: dict[str, Any]) -> str:
    if "error" in row:
        return str(row["error"])
    total = row["state_bytes"] + row["resting_bytes"] + row["temporary_bytes"]
    return f"{total / 2**30:.1f} GiB"


if __name__ == "__main__":
    run(main)
