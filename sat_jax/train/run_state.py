"""The state of a run in one of its two forms, and the conversions between them."""

import jax
from jaxtyping import Array

from sat_jax.data.batch import Batch
from sat_jax.nn.top_tokens import TopTokens
from sat_jax.sparsity.correction import Corrections
from sat_jax.sparsity.execution.state import PARAMS, OmittedState, TrainState
from sat_jax.sparsity.plan import Stored
from sat_jax.sparsity.rows import Kept
from sat_jax.sparsity.selection import Unranked
from sat_jax.sparsity.statistics import Statistics
from sat_jax.train.programs import Compiled, RungPrograms
from sat_jax.train.step import StepMetrics


class RunState:
    """Full, or in the form that a rung trains (compact, in gather execution).

    Checkpoints, evaluations, probes and exports use the full form: `expand` first, and `compact`
    with the same kept units to go on. Both are exact, so that the pair changes no bit. In the full
    form matrices in `stored` have their stored blocks alone.
    """

    def __init__(
        self,
        full: TrainState,
        stats: Statistics,
        kept: Kept | None,
        corrections: Corrections | None = None,
        stored: Stored = (),
    ):
        self.stored = stored
        self.stats, self.kept, self.corrections = stats, kept, corrections or {}
        self._state = full
        self._omitted: OmittedState = []
        self._rung: RungPrograms | None = None

    @property
    def full(self) -> TrainState:
        """The full state; a compact one has to be expanded first."""
        assert self._rung is None, "expand the state first"
        return self._state

    def replace(self, full: TrainState, stored: Stored) -> None:
        """Set the full state, whose matrices `stored` have these blocks."""
        assert self._rung is None, "expand the state first"
        self._state, self.stored = full, stored

    def expand(self) -> None:
        """Convert the state to its full form, if it is not."""
        if self._rung is not None:
            assert self.kept is not None
            self._state = self._rung.expand(self._state, self._omitted, self.kept)
            self._rung, self._omitted = None, []

    def compact(self, programs: RungPrograms) -> None:
        """Convert the full state to the form that a rung trains, with the kept units at hand."""
        assert self.kept is not None and self._rung is None
        self._state, self._omitted = programs.compact(self._state, self.kept)
        self._rung = programs

    def choose(
        self, programs: RungPrograms, probe: Compiled | None = None, batch: Batch | None = None
    ) -> dict[str, Unranked]:
        """Choose the kept units of a rung anew; with `probe`, observe the full model on `batch`
        first. Return by unit how many layers have scores that are no ranking."""
        if probe is not None:
            full = self.full
            self.stats = probe(full.params, self.stats, batch, full.optimizer)
        self.kept, unranked = programs.select(self.full, self.stats)
        self.corrections = programs.correct(self.full, self.stats, self.kept)
        return unranked

    def step(self, batch: Batch, *stored: TopTokens) -> StepMetrics:
        """Train one optimizer step; `stored`: the tokens of a stored teacher, if there is one."""
        assert self._rung is not None, "enter a rung first"
        omitted: dict[str, Array] = self._omitted[PARAMS]
        self._state, self.stats, metrics = self._rung.step(
            *(self._state, self.stats, self.kept, batch, omitted, self.corrections, *stored)
        )
        return metrics

    def wait(self) -> None:
        """Block until the device has computed everything."""
        jax.block_until_ready((self._state, self._omitted, self.stats))
