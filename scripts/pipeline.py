"""Compare pipeline schedules: step time, idle time and activation memory, simulated.

  python -m scripts.pipeline --stages 4 --microbatches 8
  python -m scripts.pipeline --stages 4 --microbatches 8 --schedule zb-h1 --timeline

Costs are those of the layers of one device for one microbatch: one number, or one for each device,
such as 1,1,1,1.4 where the last one also computes the head. Times have any one unit. Transfers
between devices take no time. gpipe and 1f1b compute the gradients of inputs and weights in one
task, zb-h1 in two; circular and interleaved split the layers of each device into chunks.
"""

from sat_jax.cli import Parser, run
from sat_jax.errors import UserError
from sat_jax.parallel.schedules import (
    CHUNKED,
    EXECUTED,
    SCHEDULES,
    make_schedule,
    simulate,
    stage_costs,
    timeline,
)


def parser() -> Parser:
    """Return the parser of the command line."""
    result = Parser("pipeline", __doc__)
    add = result.add_argument
    add("--stages", type=int, required=True, metavar="N", help="devices, each with equal layers")
    add("--microbatches", type=int, required=True, metavar="N", help="microbatches of a step")
    names = ", ".join(SCHEDULES)
    add("--schedule", default="all", metavar="NAME", help=f"{names}, or all; default all")
    chunked = " and ".join(CHUNKED)
    add("--chunks", type=int, metavar="N", help=f"chunks on a device in {chunked}; default 2")
    for name, what in (
        ("forward", "time of the forward pass"),
        ("input", "time of the gradients of inputs"),
        ("weight", "time of the gradients of weights"),
        ("activation-bytes", "bytes held from the forward pass to the weight gradients"),
    ):
        add(f"--{name}", type=_numbers, default=(1.0,), metavar="X[,X]", help=f"{what}; default 1")
    add("--timeline", action="store_true", help="also print the task of each device in each slot")
    return result


def main() -> None:
    """Print a row for each schedule, and on request its timeline."""
    args = parser().parse_args()
    names = list(SCHEDULES) if args.schedule == "all" else [args.schedule]
    lines = [_line(("schedule", "chunks", "step time", "idle", "activations", "bytes", "executed"))]
    for name in names:
        chunks = args.chunks if args.schedule != "all" or name in CHUNKED else None
        try:
            schedule = make_schedule(name, args.stages, args.microbatches, chunks)
        except UserError as error:
            if args.schedule != "all" or name not in CHUNKED:
                raise
            lines.append(f"{name:12} not possible: {error}")
            continue
        times = (args.forward, args.input, args.weight, args.activation_bytes)
        result = simulate(schedule, stage_costs(schedule, *times))
        cells = (f"{result.step_time:g}", f"{result.bubble:.1%}", str(max(result.activations)))
        executed = "yes" if name in EXECUTED else "no"
        size = f"{max(result.activation_bytes):g}"
        lines.append(_line((name, str(schedule.chunks), *cells, size, executed)))
        if args.timeline:
            lines += timeline(schedule)
    print("\n".join(lines))
    print("activations, bytes: the peak on the device with the most; one activation is that of")
    print("one stage for one microbatch. executed: whether training runs the schedule")


def _line(cells: tuple[str, ...]) -> str:
    name, *numbers = cells
    return f"{name:12}" + "".join(f"{cell:>13}" for cell in numbers)


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(number) for number in text.split(","))


if __name__ == "__main__":
    run(main)
