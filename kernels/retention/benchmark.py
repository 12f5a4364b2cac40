"""Time retention of one layer of RetNet-1.3B on the current device, alone and with gradients.

  python -m kernels.retention.benchmark --out FILE
  python -m kernels.retention.benchmark --out FILE --length 16384 --rows 1 --chunk 128 256 512 1024

Appends a JSON line per measurement, with versions, device and commit, and prints it in short.
On a TPU it compares the kernel with XLA; other devices would interpret it, and time XLA alone.
"""

import argparse
import datetime
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from kernels import measure
from kernels.provenance import provenance
from kernels.retention.workloads import RETNET_1_3B, programs


def main() -> None:
    """Measure every case, also after the failure of another."""
    parser = argparse.ArgumentParser(
        "python -m kernels.retention.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FILE", help="JSON lines; rows are appended")
    add("--rows", type=measure.count, default=8, help="default: 8")
    add("--length", type=measure.count, default=2048, help="tokens of a row (default: 2048)")
    add("--chunk", type=measure.count, nargs="+", default=[512], help="default: 512")
    add("--repeat", type=measure.count, default=20, help="timings of each (default: 20)")
    args = parser.parse_args()
    for row in _measured(args):
        with args.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        case = "  ".join(str(row[name]) for name in ("program", "implementation", "dtype", "chunk"))
        print(f"{case}: {row.get('error') or _speed(row)}", flush=True)


def _measured(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    implementations = ("xla", "pallas_tpu") if jax.default_backend() == "tpu" else ("xla",)
    cases = itertools.product(("bfloat16", "float32"), args.chunk, implementations)
    source = provenance()
    for dtype, chunk, implementation in cases:
        sizes = {"rows": args.rows, "length": args.length, "chunk": chunk}
        workload = RETNET_1_3B._replace(**sizes)
        for name, program in programs(workload, implementation, dtype).items():
            row: dict[str, Any] = {"benchmark": "retention", "program": name, "dtype": dtype}
            row |= {"implementation": implementation, **workload._asdict(), **source}
            row["flops"] = program.flops
            row["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            try:
                with measure.time_limit():
                    seconds = measure.seconds(program, args.repeat)
                row |= {"seconds": seconds, "repeat": args.repeat}
            except Exception as error:
                row["error"] = measure.first_line(error)
            yield row


def _speed(row: dict[str, Any]) -> str:
    return f"{1e3 * row['seconds']:.3f} ms, {row['flops'] / row['seconds'] / 1e12:.2f} TFLOP/s"


if __name__ == "__main__":
    main()
