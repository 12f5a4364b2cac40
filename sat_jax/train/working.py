"""The state of a run in one of its two forms, and the moves between them."""

import jax
from jaxtyping import Array

from sat_jax.data.batch import Batch
from sat_jax.sparsity.masks import Masks
from sat_jax.sparsity.statistics import Statistics
from sat_jax.train.programs import Compiled, RungPrograms
from sat_jax.train.state import Resting, TrainState, resting_params
from sat_jax.train.step import StepMetrics


class Working:
    """Whole, or entered into a rung, where steps train it (compacted, in gather execution).

    Checkpoints, evaluations, probes and exports see it whole: `leave` first, and `enter` the same
    masks again to go on. Both are exact, so leaving and entering changes no bit.
    """

    def __init__(
        self,
        whole: TrainState,
        stats: Statistics,
        masks: Masks | None,
        offsets: dict[str, Array] | None = None,
    ):
        self.stats, self.masks, self.offsets = stats, masks, offsets or {}
        self._state = whole
        self._resting: Resting = []
        self._entered: RungPrograms | None = None

    @property
    def whole(self) -> TrainState:
        """The whole state; entered ones have to be left first."""
        assert self._entered is None, "leave the rung first"
        return self._state

    def leave(self) -> None:
        """Makes the state whole."""
        if self._entered is not None:
            assert self.masks is not None
            self._state = self._entered.leave(self._state, self._resting, self.masks)
            self._entered, self._resting = None, []

    def enter(self, programs: RungPrograms) -> None:
        """Enters a rung with the masks at hand."""
        assert self.masks is not None and self._entered is None
        self._state, self._resting = programs.enter(self._state, self.masks)
        self._entered = programs

    def choose(self, programs: RungPrograms, probe: Compiled | None, batch: Batch) -> None:
        """Chooses new masks for a rung; with `probe`, observes the whole model on `batch` first."""
        if probe is not None:
            self.stats = probe(self.whole.params, self.stats, batch, self.whole.step)
        self.cut(programs)

    def cut(self, programs: RungPrograms) -> None:
        """New masks for a rung by the statistics at hand; where nothing is chosen, they only say
        how layers are cut into segments."""
        self.masks = programs.select(self.whole, self.stats)
        self.offsets = programs.compensate(self.whole, self.stats, self.masks)

    def step(self, batch: Batch) -> StepMetrics:
        """One optimizer step."""
        assert self._entered is not None, "enter a rung first"
        self._state, self.stats, metrics = self._entered.step(
            *(self._state, self.stats, self.masks, batch),
            *(resting_params(self._resting), self.offsets),
        )
        return metrics

    def wait(self) -> None:
        """Blocks until the device has done all that was asked for."""
        jax.block_until_ready((self._state, self._resting, self.stats))
