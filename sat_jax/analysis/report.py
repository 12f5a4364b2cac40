"""The roofline of a step as tables, as JSON, and as a picture."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sat_jax.analysis.devices import NUMBERS, Device
from sat_jax.analysis.roofline import (
    Kernel,
    Roofline,
    memory_bound_share,
    overlapped_seconds,
    step_seconds,
)
from sat_jax.results.run_plots import GREY, INK, new_figure, tidy
from sat_jax.results.text import fixed_width, markdown, percent, quantity

_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_KERNELS = ("calls", "FLOPs", "bytes", "index", "FLOP/byte", "bound", "time", "on chip")
_STEPS = (
    "sparsity", "stored", "kernel by kernel", "memory-bound", "fused", "memory-bound", "overlapped",
    "sparsity buys", "fusion buys", "both", "on chip", "state",
)  # fmt: skip


def kernel_table(kernels: Sequence[Kernel], device: Device, title: str) -> str:
    """Return a table of one call of each kernel; `time` is that of all its calls in a step."""
    rows = [
        (
            kernel.name,
            str(kernel.calls),
            quantity(kernel.flops, "FLOP") if kernel.flops else "-",
            quantity(kernel.bytes, "B"),
            quantity(kernel.index_bytes, "B") if kernel.index_bytes else "-",
            f"{kernel.intensity:,.0f}",
            kernel.bound(device),
            _seconds(kernel.seconds(device)),
            quantity(kernel.on_chip, "B") if kernel.on_chip else "-",
        )
        for kernel in kernels
    ]
    return fixed_width((title, *_KERNELS), rows)


def step_rows(lines: Sequence[Roofline], device: Device) -> list[tuple[str, ...]]:
    """Return the row of each sparsity: least times, share of the time in kernels that memory
    limits, and speed-ups over the first sparsity, kernel by kernel. `stored` is the share of the
    layers' matrices that is stored. `on chip` is the largest of the
    fused groups; `>` marks one that the device does not have."""
    base = lines[0]
    before = step_seconds(base.kernels, device)
    rows: list[tuple[str, ...]] = []
    for line in lines:
        kernels, groups = (step_seconds(k, device) for k in (line.kernels, line.groups))
        on_chip = max(group.on_chip or 0.0 for group in line.groups)
        exceeds = "> " if on_chip > device.on_chip_memory else ""
        rows.append(
            (
                f"{100 * line.setting.sparsity:g} %",
                f"{100 * line.stored_share:.3g} %",
                _seconds(kernels),
                percent(memory_bound_share(line.kernels, device)),
                _seconds(groups),
                percent(memory_bound_share(line.groups, device)),
                _seconds(overlapped_seconds(line.groups, device)),
                f"{before / kernels:.2f}×",
                f"{kernels / groups:.2f}×",
                f"{before / groups:.2f}×",
                exceeds + quantity(on_chip, "B"),
                quantity(line.state_bytes, "B"),
            )
        )
    return rows


def step_table(lines: Sequence[Roofline], device: Device) -> str:
    """Return the rows of `step_rows` as a table."""
    return fixed_width(_STEPS, step_rows(lines, device))


def device_table(lines: Sequence[Roofline], devices: dict[str, Device]) -> str:
    """Return the rows of `step_rows` for several devices in Markdown, without the state."""
    rows = [
        (name, *row[:-1]) for name, device in devices.items() for row in step_rows(lines, device)
    ]
    return markdown(("device", *_STEPS[:-1]), rows)


def number_table(devices: dict[str, Device]) -> str:
    """Return the numbers of devices in Markdown."""
    header = ("device", "chip", "peak, bfloat16", "bandwidth", "ridge", "on chip", "memory")
    rows = [
        (
            name,
            device.name,
            quantity(device.peak_flops, "FLOP/s"),
            quantity(device.bandwidth, "B/s"),
            f"{device.ridge:,.0f} FLOP/B",
            quantity(device.on_chip_memory, "B"),
            quantity(device.memory, "B"),
        )
        for name, device in devices.items()
    ]
    return markdown(header, rows, left=2)


def device_lines(device: Device) -> str:
    """Return the numbers of a device with their sources, a line each."""
    units = dict(zip(NUMBERS, ("FLOP/s", "B/s", "B", "B"), strict=True))
    lines = [
        f"  {name}: {quantity(getattr(device, name), unit)} ({device.sources[name]})"
        for name, unit in units.items()
    ]
    return "\n".join((device.name, *lines))


def as_json(model: str, lines: Sequence[Roofline], device: Device) -> dict[str, Any]:
    """Return all numbers; bytes, FLOPs, and seconds of all calls."""

    def row(kernel: Kernel) -> dict[str, Any]:
        limits = {"bound": kernel.bound(device), "seconds": kernel.seconds(device)}
        return dataclasses.asdict(kernel) | {"intensity": kernel.intensity} | limits

    def part(kernels: Sequence[Kernel]) -> dict[str, Any]:
        return {
            "seconds": step_seconds(kernels, device),
            "overlapped_seconds": overlapped_seconds(kernels, device),
            "memory_bound_share": memory_bound_share(kernels, device),
            "kernels": [row(kernel) for kernel in kernels],
        }

    steps = [
        dataclasses.asdict(line.setting)
        | {"state_bytes": line.state_bytes, "stored_share": line.stored_share}
        | {"kernel_by_kernel": part(line.kernels), "fused": part(line.groups)}
        for line in lines
    ]
    return {"model": model, "device": dataclasses.asdict(device), "steps": steps}


def picture(model: str, lines: Sequence[Roofline], device: Device) -> Figure:
    """Return a roofline with a point for each group of operators that has FLOPs: hollow kernel by
    kernel, where norms and activations take it below the roof, and filled if fused."""
    figure = new_figure(height=5.5, width=9.0)
    axes = figure.add_subplot()
    tidy(axes, title=f"{model} on {device.name}", x="operational intensity [FLOP/byte]",
         y="attainable FLOP/s")  # fmt: skip
    names = [group.name for group in lines[0].groups if group.flops]
    intensities = [device.ridge]
    for number, line in enumerate(lines):
        for group, marker in zip(names, _MARKERS, strict=False):
            for kernels, filled in ((line.kernels, False), (line.groups, True)):
                members = [kernel for kernel in kernels if kernel.group == group]
                flops = sum(kernel.calls * kernel.flops for kernel in members)
                x = flops / sum(kernel.calls * kernel.bytes for kernel in members)
                colour = _COLOURS[number % len(_COLOURS)]
                axes.plot(
                    x, flops / step_seconds(members, device), marker, color=colour, markersize=7,
                    markerfacecolor=colour if filled else "white", zorder=3,
                )  # fmt: skip
                intensities.append(x)
    low, high = min(intensities) / 2, max(intensities) * 2
    roof = [min(device.peak_flops, x * device.bandwidth) for x in (low, device.ridge, high)]
    axes.loglog((low, device.ridge, high), roof, color=INK, linewidth=1.2, zorder=1)
    axes.axvline(device.ridge, color=GREY, linewidth=0.8, linestyle="--", zorder=0)

    def key(label: str, marker: str, colour: str, face: str | None = None) -> Line2D:
        face = face or colour
        return Line2D([], [], marker=marker, color=colour, markerfacecolor=face, ls="", label=label)

    keys = [key(group, marker, INK) for group, marker in zip(names, _MARKERS, strict=False)]
    keys += [
        key(f"{100 * line.setting.sparsity:g} % sparse", "o", _COLOURS[number % len(_COLOURS)])
        for number, line in enumerate(lines)
    ]
    keys += [key("kernel by kernel", "o", INK, "white"), key("fused", "o", INK)]
    axes.legend(handles=keys, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def _seconds(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{1e3 * seconds:.1f} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.0f} µs"
