"""The most likely tokens of a teacher for all training rows, computed once (`distill.topk`).

`<prepared data>/teacher/<fingerprint>/` has `ids.npy` `[rows, T, k]`, int32, and `log_p.npy`
`[rows, T, k + 1]`, float32 (`nn.top_tokens`), in the order of the stored rows. The fingerprint is
that of the data, of the teacher, of k, of the temperature and of the compute dtype. The folder is
complete when it has this name.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Float, Int

from sat_jax.config import Config
from sat_jax.data.batch import Batch
from sat_jax.data.batches import in_order, open_split
from sat_jax.data.prepare import Prepared, complete_folder, locked
from sat_jax.errors import UserError
from sat_jax.interop import Weights
from sat_jax.models.build import layout_of
from sat_jax.nn.decoder import Compute
from sat_jax.nn.mesh_axes import full_rows
from sat_jax.nn.top_tokens import TopTokens, top_tokens
from sat_jax.parallel.rules import BATCH
from sat_jax.train.run_weights import model_fingerprint
from sat_jax.train.teacher import read_teacher, teacher_path


class StoredTokens(NamedTuple):
    """The tokens of all rows, on disk."""

    ids: Int[np.ndarray, "rows T k"]
    log_p: Float[np.ndarray, "rows T k+1"]

    def of_rows(self, numbers: Sequence[int]) -> TopTokens:
        """Return the tokens of the rows with these numbers."""
        return TopTokens(self.ids[numbers], self.log_p[numbers])


def stored_tokens(
    config: Config, data: Prepared, weights: Weights, mesh: Mesh, log: Callable[[str], None]
) -> StoredTokens:
    """Return the tokens of the teacher with these weights; they are computed if they are missing.

    Raises `UserError` for a k above the size of the vocabulary, and if several processes would have
    to compute them.
    """
    k, vocabulary = config.distill.topk, weights.config.vocab_size
    assert k is not None
    if k > vocabulary:
        raise UserError(
            f"distill.topk {k}; accepted: 1 to {vocabulary}, the size of the vocabulary"
        )
    path = data.path / "teacher" / _fingerprint(config, data)
    path.parent.mkdir(exist_ok=True)
    with locked(path.with_suffix(".lock"), log):
        if not path.exists():
            if jax.process_count() > 1:
                raise UserError(
                    f"distill.topk: {path} does not exist; accepted: a first start with one"
                    " process, which writes it"
                )
            with complete_folder(path) as folder:
                _write(folder, k, config, data, weights, mesh)
    stored = StoredTokens(
        *(np.load(path / f"{n}.npy", mmap_mode="r") for n in StoredTokens._fields)
    )
    size, count = sum(array.nbytes for array in stored) / 1e6, len(stored.ids)
    log(f"distill.topk: {k} of {vocabulary} tokens, {count} rows, {size:,.0f} MB in {path}")
    return stored


def _fingerprint(config: Config, data: Prepared) -> str:
    distill = config.distill
    teacher = model_fingerprint(teacher_path(config))
    parts = [data.info.fingerprint, teacher, distill.topk, distill.temperature, config.model.dtype]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


def _write(
    folder: Path, k: int, config: Config, data: Prepared, weights: Weights, mesh: Mesh
) -> None:
    """Write the tokens of all training rows. Each batch has the rows of a microbatch."""
    temperature, chunk = config.distill.temperature, config.model.loss_chunk
    layout = layout_of(weights.config, Compute(dtype=config.model.dtype))
    params = read_teacher(config, weights, mesh).params

    @jax.jit
    def of_batch(params: dict[str, jax.Array], batch: Batch) -> TopTokens:
        model = layout.bind(params)
        x_BTE, _ = model.hidden(batch.tokens, batch.segment_ids, batch.positions)
        return top_tokens(x_BTE, full_rows(model.head()), k, temperature, chunk)

    rows = open_split(data, "train")
    shape, per_batch = (len(rows), rows.row_length), config.train.rows_per_step
    per_batch //= config.train.accumulate
    ids, log_p = (
        np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, (*shape, width))
        for name, dtype, width in (("ids", np.int32, k), ("log_p", np.float32, k + 1))
    )
    with jax.set_mesh(mesh):
        for number, batch in enumerate(in_order(rows, per_batch)):
            top = of_batch(params, jax.device_put(batch, NamedSharding(mesh, BATCH)))
            here = slice(number * per_batch, (number + 1) * per_batch)
            for stored, new in zip((ids, log_p), top, strict=True):
                stored[here] = np.asarray(new)[: len(stored[here])]
    for stored in (ids, log_p):
        stored.flush()
