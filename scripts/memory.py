"""Memory that training steps of large models need, compiled for an accelerator that is not there.

  .venv-aot/bin/python -m scripts.memory --target h200 --model llama-2-7b --rows 4

By XLA's own account: the state that is trained (parameters and moments), the omitted neurons that
rest beside it, temporaries (gradients, activations, copies), and what a refresh needs when kept and
omitted neurons are parted or put together. Attention is in plain XLA, as cuDNN's wants a device;
on one with cuDNN's the temporaries are smaller. `make memory` makes the rows that are committed;
a row that is there already is not made again.
"""

import functools
from pathlib import Path
from typing import Any

from sat_jax.cli import Parser, run
from sat_jax.errors import UserError
from scripts.efficiency import step_options

_OUT = Path("experiments/results/memory.jsonl")


def parser() -> Parser:
    """What the command line takes."""
    made = Parser("memory", __doc__)
    step_options(made)
    made.add_argument("--target", default="h200", help="h200, v5e or v5p; default h200")
    made.add_argument("--out", type=Path, default=_OUT, metavar="FILE", help="JSON lines, added to")
    return made


def main() -> None:
    """Compiles what is not there yet."""
    given = parser().parse_args()
    import kernels.aot as aot  # before jax, which it tells that there is no device
    from scripts.large_steps import (
        Case,
        Row,
        add_rows,
        checked,
        described,
        refresh_bytes,
        sparse_cases,
    )

    if given.target not in aot.TARGETS:
        raise UserError(f"--target {given.target}; accepted: {', '.join(aot.TARGETS)}")
    if reason := aot.compiler_error(given.target):
        raise UserError(f"--target {given.target}: {reason}; `make memory` installs its compiler")
    model = checked(given)

    def compiled(case: Case) -> Row:
        row, program = described(model, case, given, attention="xla")
        row |= _memory(aot.memory(given.target, program.function, program[1:]))
        if case.execution == "gather":
            analysed = functools.partial(aot.memory, given.target)
            row["refresh_bytes"] = refresh_bytes(model, case, given, analysed)
        return row

    cases = list(sparse_cases("step", given))
    for row in add_rows(given.out, given, given.target, cases, compiled):
        if "error" in row:
            print(f"{_name(row)}: {row['error']}", flush=True)
            continue
        total = row["state_bytes"] + row["resting_bytes"] + row["temporary_bytes"]
        print(f"{_name(row)}: {total / 2**30:.1f} GiB", flush=True)


def _name(row: dict[str, Any]) -> str:
    return f"{row['model']}  {row['execution']}  r = {row['rate']:g}"


def _memory(analysis: Any) -> dict[str, int]:
    return {
        "state_bytes": analysis.argument_size_in_bytes,
        "temporary_bytes": analysis.temp_size_in_bytes,
    }


if __name__ == "__main__":
    run(main)
