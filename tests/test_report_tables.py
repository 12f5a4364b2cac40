"""Numbers of the tables of a report, reckoned by hand."""

import dataclasses
from pathlib import Path

from sat_jax.analysis.curves import part_means
from sat_jax.analysis.results import record_run
from sat_jax.config import DataConfig
from sat_jax.report.collect import collect
from sat_jax.report.page import write_report
from tests.report_runs import (
    DENSE,
    DEVICE,
    RECORDS,
    SPARSE,
    config_of,
    runs,
    study,
    summary_of,
    table,
)
from tests.tolerances import assert_close


def test_numbers_of_the_quality_table(tmp_path: Path) -> None:
    """By hand: gaps 10 % and 20 %; times 40 s dense, 20 s and 16 s sparse."""
    rates = table(study(tmp_path), "rates")
    assert rates.header == (
        "rate", "seeds", "held-out perplexity before", "after", "from dense", "FLOPs", "whole run",
        "bound",
    )  # fmt: skip
    assert rates.texts == [
        ["dense", "2", "20.000", "15.000 ± 5.000", "-", "100 %", "-", "-"],
        ["0.2", "1", "20.000", "10.500", "+5.0 %", "80 %", "2.00×†", "1.25×"],
        ["0.4", "2", "20.000", "17.500 ± 6.500", "+15.0 % ± 5.0 %", "80 %",
         "2.25× ± 0.25×", "1.25×"],
    ]  # fmt: skip
    assert rates.notes == ["† The runs that this is made of are of several commits."]
    gap, whole = rates.rows[2][4], rates.rows[2][6]
    assert_close([gap.value, gap.error], [15.0, 5.0], "float64", "forward")
    assert_close([whole.value, whole.error], [2.25, 0.25], "float64", "forward")


def test_numbers_of_the_efficiency_table(tmp_path: Path) -> None:
    efficiency = table(study(tmp_path), "efficiency")
    assert efficiency.header[2:] == (
        "tokens/s", "time", "memory", "FLOPs", "of dense", "first rung", "bound", "whole run",
        "bound",
    )  # fmt: skip
    dense, at_4, at_2 = efficiency.texts
    assert dense[2:] == ["100 ± 0", "40.0 s ± 0.0 s", "2.00 GB", "10.00 GFLOP", "100 %", *"----"]
    assert at_4[2:] == [
        "150 ± 0", "18.0 s ± 2.0 s", "2.00 GB", "8.00 GFLOP", "80 %", "1.50× ± 0.00×", "1.33×",
        "2.25× ± 0.25×", "1.25×",
    ]  # fmt: skip
    assert at_2[-4:] == ["1.50×", "1.33×", "2.00×†", "1.25×"]


def test_where_in_the_run_the_loss_is_higher(tmp_path: Path) -> None:
    """By hand: half a nat above dense in the first of eight steps, a quarter in the second; with
    the other seed nothing, and with a third, which has no dense run, what is not compared."""
    above = [
        RECORDS[0],
        *(
            {**one, "loss": one["loss"] + more}
            for one, more in zip(RECORDS[1:], (0.5, 0.25, *[0.0] * 6), strict=True)
        ),
    ]
    file = tmp_path / "rows.jsonl"
    for seed, rate, records in (
        (0, 0.0, RECORDS),
        (1, 0.0, RECORDS),
        (0, 0.4, above),
        (1, 0.4, RECORDS),
        (2, 0.4, RECORDS),
    ):
        rungs = SPARSE if rate else DENSE
        record_run(
            file,
            "experiments/x.py",
            config_of(seed, rate=rate),
            summary_of(9.0, 18.0, rungs),
            records,
        )
    losses = table(collect([], [file], print), "losses")
    assert losses.header == ("rate", "seeds", "steps 1 to 1", *(f"{k} to {k}" for k in range(2, 9)))
    assert losses.texts == [["0.4", "2", "+0.25 ± 0.25", "+0.12 ± 0.12", *["+0.00 ± 0.00"] * 6]]
    assert part_means({"tokens": [10, 20], "loss": [1.0, 2.0]}, 3) == []
    uneven = part_means({"tokens": [10, 30, 40], "loss": [1.0, 4.0, None]}, 2)
    assert uneven == [2.5, None]  # 10 tokens at 1 and 10 at 4; what follows is not finite


def test_dense_runs_alone_have_tables_and_a_page(tmp_path: Path) -> None:
    alone = study(tmp_path)[:2]
    assert table(alone, "rates").texts == [
        ["dense", "2", "20.000", "15.000 ± 5.000", "-", "100 %", "-", "-"]
    ]
    assert [row[0] for row in table(alone, "efficiency").texts] == ["dense"]
    assert "15.000 ± 5.000" in write_report(alone, tmp_path / "out")[0].read_text()


def test_a_speed_without_a_twin_is_told_as_estimated(tmp_path: Path) -> None:
    """3000 tokens at 150 and 1000 at 100 a second: 30 s, where dense steps take 40 s."""
    other = {**DEVICE, "kind": "TPU v5e"}
    records = runs(
        tmp_path,
        (config_of(0), summary_of(10.0, 38.0, DENSE, device=other)),
        (config_of(0, rate=0.4), summary_of(11.0, 18.0, SPARSE)),
        (config_of(0, rate=0.2), summary_of(11.0, 18.0, SPARSE[:1])),
        (config_of(1, rate=0.2), summary_of(11.0, 18.0, SPARSE[:1], device=other)),
    )
    rates = table(records, "rates")
    assert [row[-2] for row in rates.texts] == ["-", "-", "≈ 1.33×"]
    # Of two seeds at 0.2 one has a dense run: what is known of that is told, and that it is of it.
    assert [row[4].text for row in rates.rows] == ["-", "+10.0 %§", "+10.0 %"]
    assert "fewer seeds" in rates.notes[0] and "own dense rung" in rates.notes[1]
    efficiency = table(records, "efficiency")
    assert efficiency.rows[2][2].text == "150 ± 0‡" and "several devices" in efficiency.notes[0]
    assert efficiency.rows[2][7].text == "-"  # a dense rung of no run on the device of seed 0
    assert efficiency.rows[1][7].text == "1.50×"


def test_a_fine_tuning_table_says_how_full_rows_are(tmp_path: Path) -> None:
    tuned = dataclasses.replace(config_of(0), data=DataConfig(format="messages"))
    records = runs(tmp_path, (tuned, summary_of(10.0, 38.0, DENSE, loss_tokens=1000)))
    caption = table(records, "sft").caption
    assert "25 % of them learnt; 87 % of the slots useful; 100 examples, not as" in caption
    assert "were: 2 without an answer, 4 longer than a row (dropped); learning rate" in caption
    summary = summary_of(10.0, 38.0, DENSE, loss_tokens=1000)
    del summary["prepared"]  # as older versions wrote it
    (tmp_path / "older").mkdir()
    assert "slots" not in table(runs(tmp_path / "older", (tuned, summary)), "sft").caption
    assert "slots" not in table(study(tmp_path), "rates").caption
