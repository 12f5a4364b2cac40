"""Compute what sparsity and fusion can buy: the roofline of a training step on a device.

  python -m scripts.roofline --model gpt-13b --device a100 --sparsity 0,0.75,0.875

Prints for each sparsity one call of every operator and of every fused group of the step: FLOPs,
bytes from and to device memory, bytes of block indices, operational intensity, what limits it, the
least time of all its calls, and for fused groups the on-chip memory with which each array moves
once. The last table compares the steps. Nothing is executed or measured. The numbers of a device
and their sources are in sat_jax/analysis/devices.json; --device FILE.json has one entry like those.
"""

import dataclasses
import json
from pathlib import Path

from sat_jax.analysis.devices import known_devices, read_device
from sat_jax.analysis.operators import Setting
from sat_jax.cli import Parser, run
from sat_jax.errors import UserError
from sat_jax.models.presets import preset


def parser() -> Parser:
    """Return the parser of the command line."""
    result = Parser("roofline", __doc__)
    add = result.add_argument
    add("--model", default="gpt-13b", help="a preset; default gpt-13b")
    names = ", ".join(known_devices())
    add("--device", default="a100", help=f"{names}, or a JSON file; default a100")
    add("--sparsity", default="0,0.75,0.875", metavar="S,...", help="shares of the blocks of each"
        " matrix in the layers that are omitted; default 0,0.75,0.875")  # fmt: skip
    add("--block", type=int, default=128, help="rows and columns of a block; default 128")
    add("--tokens", type=int, default=2048, help="tokens of a microbatch; default 2048")
    add("--microbatches", type=int, default=1, help="microbatches of a step; default 1")
    add("--row-length", type=int, help="tokens of a row; default: those of a microbatch, or the"
        " model's positions if these are fewer")  # fmt: skip
    add("--forward-only", action="store_true", help="a forward pass that saves nothing for a"
        " backward pass, without optimizer")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="write all numbers")
    add("--picture", type=Path, metavar="FILE.png", help="draw the roofline")
    return result


def main() -> None:
    """Print the tables and write the files."""
    args = parser().parse_args()
    model, device = preset(args.model), read_device(args.device)
    row_length = args.row_length
    if row_length is None:
        row_length = min(args.tokens, model.max_positions)
    setting = Setting(
        args.tokens,
        row_length,
        block=args.block,
        microbatches=args.microbatches,
        training=not args.forward_only,
    )
    settings = [dataclasses.replace(setting, sparsity=s) for s in _sparsities(args.sparsity)]
    if args.picture and args.picture.suffix != ".png":
        raise UserError(f"--picture {args.picture}; accepted: a file that ends with .png")
    from sat_jax.analysis import report
    from sat_jax.analysis.roofline import roofline
    from sat_jax.models.build import layout_of

    # Weights may have more positions than the published model.
    model = dataclasses.replace(model, max_positions=max(model.max_positions, row_length))
    lines = [roofline(layout_of(model), each) for each in settings]
    for line in lines:
        share = f"{100 * line.setting.sparsity:g} % sparse"
        print(report.kernel_table(line.kernels, device, f"{share}, kernel by kernel") + "\n")
        print(report.kernel_table(line.groups, device, f"{share}, fused") + "\n")
    print(report.step_table(lines, device) + "\n")
    print(report.device_lines(device))
    try:
        if args.json:
            text = json.dumps(report.as_json(args.model, lines, device), indent=1)
            args.json.write_text(text + "\n", encoding="utf-8")
        if args.picture:
            figure = report.picture(args.model, lines, device)
            figure.savefig(args.picture, format="png", metadata={"Software": None})
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be written: {error.strerror}") from error


def _sparsities(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--sparsity {text}; accepted: numbers with commas between") from None


if __name__ == "__main__":
    run(main)
