"""The operators of a training step and the arrays that they read and write.

All shapes come from the named axes of a model's `Layout`. Operators of the layers are those of one
layer. FLOPs are those of matrix products and attention, as in `sat_jax.sparsity.flops`; norms,
activations, residual sums, embedding look-up, loss and optimizer move bytes and count no FLOPs.

Conventions:

- Attention is one operator, that keeps the scores on chip and computes them again in the backward
  pass (Dao et al., arXiv:2205.14135), also kernel by kernel. The sums of its softmax are left out.
- Blocks of sparse weights are stored in block sparse row format: each block row has equally many
  blocks, and each product reads an int32 for each block and block row, plus one.
- Products compute tiles of `block` tokens, of which the last one may be partial, in full.
- Norms, biases and the positions that they belong to are read in the dtype of the activations.
- Branches follow each other; those of a parallel residual read the same stream twice here.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from sat_jax.errors import UserError
from sat_jax.nn.layout import Layout
from sat_jax.nn.param import EMBED, LAYER

_FLOAT32, _INT32 = 4, 4

Kind = Literal["weight", "index", "gradient", "sum", "stream", "unit"]


class Tensor(NamedTuple):
    """An array in device memory, and its bytes.

    `kind`: a weight, its block index, its gradient, the sum of gradients of earlier microbatches,
    which is added where a gradient is written, or an activation as wide as the residual stream
    or as heads, channels or the vocabulary (`unit`). `width`: its size along the axis that fused
    operators split. `sources`: the arrays that it is computed from element by element or token by
    token, so that a fused operator reads these instead.
    """

    name: str
    kind: Kind
    bytes: float
    width: int
    sources: tuple["Tensor", ...] = ()


class Operator(NamedTuple):
    """One kernel. `group`: the operators that are fused with it. `calls`: how often a step runs it.
    `mixes`: whether a token needs what the operator reads of all other tokens of its row."""

    name: str
    group: str
    flops: float
    reads: tuple[Tensor, ...]
    writes: tuple[Tensor, ...]
    calls: int
    mixes: bool = False


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a step computes, on rows of `row_length` tokens.

    `tokens`: those of a microbatch. `microbatches`: how many have their gradients summed before the
    optimizer. `sparsity`: the share of the layers' matrices that is omitted, in blocks of `block` ×
    `block`. `value_bytes`: of a value in products. `training` False: the forward pass alone, which
    saves nothing for a backward pass.
    """

    tokens: int
    row_length: int
    sparsity: float = 0.0
    block: int = 128
    value_bytes: int = 2
    microbatches: int = 1
    training: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise UserError(f"sparsity {self.sparsity:g}; accepted: from 0 to below 1")
        for name in ("tokens", "row_length", "block", "microbatches"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)}; accepted: 1 or more")
        if self.tokens % self.row_length:
            raise UserError(
                f"row_length {self.row_length} does not divide {self.tokens} tokens; accepted:"
                f" {_divisors(self.tokens)}"
            )

    @property
    def computed_tokens(self) -> int:
        """Tokens with the padding of the last tile."""
        return math.ceil(self.tokens / self.block) * self.block


class Matrix(NamedTuple):
    """A stored weight matrix `[width, embed]`: its number of values and the bytes of its index."""

    name: str
    width: int
    values: float
    index_bytes: float


def operators(layout: Layout[Any], setting: Setting) -> list[Operator]:
    """Return the operators of a step in order. Raises `UserError` for a block that does not divide
    a matrix."""
    graph = _Graph(layout, setting)
    optimizer = graph.optimizer() if setting.training else ()
    return [*map(graph.repeated, graph.microbatch()), *optimizer]


def stored_share(layout: Layout[Any], setting: Setting) -> float:
    """Return the share of the layers' matrices that is stored, whose blocks are rounded up."""
    paths = [path for path, _ in layout.with_role("read", "write")]
    values = layout.layers * sum(stored_matrix(layout, path, setting).values for path in paths)
    return values / sum(math.prod(layout.shapes[path].shape) for path in paths)


def stored_values(layout: Layout[Any], setting: Setting) -> float:
    """Return the number of trained values that are stored."""
    total = 0.0
    for path, leaf in layout.leaves.items():
        if leaf.trained and leaf.in_layers and leaf.role in ("read", "write"):
            total += layout.layers * stored_matrix(layout, path, setting).values
        elif leaf.trained:
            total += math.prod(layout.shapes[path].shape)
    return total


def stored_matrix(layout: Layout[Any], path: str, setting: Setting) -> Matrix:
    """Return one layer of a matrix with the blocks that the sparsity leaves, rounded up to equally
    many in each block row."""
    sizes = dict(zip(layout.leaves[path].axes, layout.shapes[path].shape, strict=True))
    embed = sizes[EMBED]
    width = math.prod(size for name, size in sizes.items() if name not in (LAYER, EMBED))
    name = path.removeprefix("layers/").replace("/", " ")
    if not setting.sparsity:
        return Matrix(name, width, float(width * embed), 0.0)
    block = setting.block
    if width % block or embed % block:
        common = _divisors(math.gcd(width, embed))
        raise UserError(
            f"block {block} does not divide {path}, {width} x {embed}; accepted: {common}"
        )
    rows, columns = width // block, embed // block
    # Rounded, since 1 - 0.7 is a little more than 0.3.
    kept = math.ceil(round((1 - setting.sparsity) * columns, 9))
    index = _INT32 * (rows * kept + rows + 1)
    return Matrix(name, width, float(rows * kept * block**2), float(index))


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


class _Graph:
    """Operators of a step, made from axes."""

    def __init__(self, layout: Layout[Any], setting: Setting):
        self.layout, self.setting = layout, setting
        path, _ = next(layout.with_role("write"))
        self.embed = layout.shapes[path].shape[-1]

    def microbatch(self) -> Iterator[Operator]:
        names = [*self.layout.branches]
        streams = [self.stream(f"x before {name}") for name in names] + [self.stream("x at end")]
        yield from self.embedding(streams[0])
        backward: list[Operator] = []
        for name, x, y in zip(names, streams, streams[1:], strict=False):
            ahead, back = self.branch(name, x, y)
            yield from ahead
            backward = [*back, *backward]
        yield from self.head(streams[-1])
        if self.setting.training:
            yield from backward
            yield from self.embedding_backward(streams[0])

    def repeated(self, operator: Operator) -> Operator:
        """Return the operator as all microbatches call it: all but the first read the gradients so
        far, which is counted for the first too."""
        calls = operator.calls * self.setting.microbatches
        sums = [a for a in operator.writes if a.kind == "gradient"]
        if self.setting.microbatches == 1:
            sums = []
        earlier = [a._replace(name=f"{a.name} so far", kind="sum") for a in sums]
        return operator._replace(calls=calls, reads=(*operator.reads, *earlier))

    def stream(self, name: str, *sources: Tensor) -> Tensor:
        size = self.setting.tokens * self.embed * self.setting.value_bytes
        return Tensor(name, "stream", size, self.embed, sources=sources)

    def unit(self, name: str, width: int, *sources: Tensor, value_bytes: int = 0) -> Tensor:
        size = self.setting.tokens * width * (value_bytes or self.setting.value_bytes)
        return Tensor(name, "unit", size, width, sources=sources)

    def index(self, matrix: Matrix) -> tuple[Tensor, ...]:
        """Return the block index of a sparse matrix, nothing for a dense one."""
        tensor = Tensor(f"{matrix.name} index", "index", matrix.index_bytes, matrix.width)
        return (tensor,) if matrix.index_bytes else ()

    def weight(self, matrix: Matrix) -> Tensor:
        size = matrix.values * self.setting.value_bytes
        return Tensor(matrix.name, "weight", size, matrix.width)

    def vectors(self, prefix: str) -> tuple[Tensor, ...]:
        """Return a layer of the vectors whose path begins so."""
        return tuple(
            self.table(path, layers=self.layout.layers if leaf.in_layers else 1)
            for path, leaf in self.layout.leaves.items()
            if leaf.role == "vector" and path.startswith(prefix)
        )

    def table(self, path: str, layers: int = 1, kind: Kind = "weight") -> Tensor:
        values = math.prod(self.layout.shapes[path].shape) / layers
        name = path.removeprefix("layers/").replace("/", " ")
        name = name if kind == "weight" else f"{name} gradient"
        return Tensor(name, kind, values * self.setting.value_bytes, self.embed)

    def branch(self, name: str, x: Tensor, y: Tensor) -> tuple[list[Operator], list[Operator]]:
        """Return the operators of a branch with its norm and residual, forward and backward."""
        layout, calls = self.layout, self.layout.layers
        tokens, units = self.setting.tokens, layout.totals(layout.branches[name].units[-1])
        mixing = units * layout.branches[name].mixing_flops(self.setting.row_length) * tokens
        inner = "mixing" if mixing else "activation"
        reading, writing = (
            [
                stored_matrix(layout, path, self.setting)
                for path, _ in layout.with_role(role)
                if path.startswith(f"layers/{name}/")
            ]
            for role in ("read", "write")
        )
        ahead, back = f"{name} forward", f"{name} backward"
        norm = self.vectors(f"layers/{name}_norm")
        bias = self.vectors(f"layers/{name}_output")
        beside = self.vectors(f"layers/{name}/")  # biases of the products, norms of heads
        normed = self.stream(f"{name} normed x", x)
        outer = [self.unit(f"{m.name} output", m.width) for m in reading]
        elementwise = () if mixing else tuple(outer)
        (down,) = writing
        active = self.unit(f"{name} activations", down.width, *elementwise)
        written = self.stream(f"{down.name} output")
        forward = [
            Operator(f"{name} norm", ahead, 0.0, (x, *norm), (normed,), calls),
            *(
                self.product(m.name, ahead, m, (normed, self.weight(m)), out, calls)
                for m, out in zip(reading, outer, strict=True)
            ),
            Operator(
                f"{name} {inner}", ahead, mixing, (*outer, *beside), (active,), calls, bool(mixing)
            ),
            self.product(down.name, ahead, down, (active, self.weight(down)), written, calls),
            Operator(f"{name} residual", ahead, 0.0, (written, x, *bias), (y,), calls),
        ]
        dy, dx = self.gradient(y), self.gradient(x)
        d_active, d_outer = self.gradient(active), [self.gradient(out) for out in outer]
        d_normed = [self.stream(f"{m.name} input gradient") for m in reading]
        backward = [*self.products_back(down, back, dy, active, d_active, calls)]
        again = mixing / 2  # the scores
        saved = (*outer, active) if mixing else tuple(outer)
        backward.append(
            Operator(
                f"{name} {inner} backward", back, 2 * mixing + again, (d_active, *saved, *beside),
                (*d_outer, *map(self.gradient, beside)), calls, bool(mixing),
            )
        )  # fmt: skip
        for m, d_out, d_in in zip(reading, d_outer, d_normed, strict=True):
            backward += self.products_back(m, back, d_out, normed, d_in, calls)
        vectors = tuple(map(self.gradient, (*norm, *bias)))
        backward.append(
            Operator(
                f"{name} norm backward", back, 0.0, (*d_normed, x, dy, *norm), (dx, *vectors), calls
            )
        )
        return forward, backward

    def gradient(self, tensor: Tensor) -> Tensor:
        kind: Kind = "gradient" if tensor.kind == "weight" else tensor.kind
        return Tensor(f"{tensor.name} gradient", kind, tensor.bytes, tensor.width)

    def product(
        self, name: str, group: str, matrix: Matrix, reads: tuple[Tensor, ...],
        result: Tensor, calls: int = 1,
    ) -> Operator:  # fmt: skip
        """Return a product with a matrix, or the one for its gradient: both need its index."""
        flops = 2.0 * self.setting.computed_tokens * matrix.values
        return Operator(name, group, flops, (*reads, *self.index(matrix)), (result,), calls)

    def products_back(
        self, matrix: Matrix, group: str, d_out: Tensor, given: Tensor, d_in: Tensor, calls: int = 1
    ) -> Iterator[Operator]:
        """Yield the products for the gradients of the input and of the stored blocks."""
        weight = self.weight(matrix)
        for operand, reads, result in (
            ("input", (d_out, weight), d_in),
            ("weight", (d_out, given), self.gradient(weight)),
        ):
            name = f"{matrix.name} {operand} gradient"
            yield self.product(name, group, matrix, reads, result, calls)

    def tables(self) -> tuple[list[str], str]:
        """Return the paths of the embeddings that tokens look up, and of the head."""
        paths = [path for path, leaf in self.layout.leaves.items() if leaf.role == "embedding"]
        vocab = [path for path in paths if "vocab" in self.layout.leaves[path].axes]
        head = vocab[-1]
        return [path for path in paths if path != head or len(vocab) == 1], head

    def embedding(self, x: Tensor) -> Iterator[Operator]:
        rows = tuple(self.stream(f"rows of {path}") for path in self.tables()[0])
        yield Operator("embedding", "embedding", 0.0, rows, (x,), 1)

    def embedding_backward(self, x: Tensor) -> Iterator[Operator]:
        """Yield the sum of rows into the gradients, of which a tied head's exists by then."""
        looked_up, head = self.tables()
        reads, writes = [self.gradient(x)], []
        for path in looked_up:
            if path == head:
                rows = self.stream(f"rows of {path} gradient")
                reads.append(rows)
                writes.append(rows._replace(kind="gradient"))
            else:
                writes.append(self.table(path, kind="gradient"))
        yield Operator("embedding backward", "embedding backward", 0.0, (*reads,), (*writes,), 1)

    def head(self, x: Tensor) -> Iterator[Operator]:
        """Yield final norm, logits and loss; the loss forms the gradient of the logits."""
        group, path = "head and loss", self.tables()[1]
        vocab, embed = self.layout.shapes[path].shape
        matrix = Matrix("head", vocab, float(vocab * embed), 0.0)
        norm = self.vectors("final_norm")
        normed = self.stream("final normed x", x)
        logits = self.unit("logits", vocab, value_bytes=_FLOAT32)
        d_logits = self.unit("logits gradient", vocab)
        training = self.setting.training
        yield Operator("final norm", group, 0.0, (x, *norm), (normed,), 1)
        yield self.product("logits", group, matrix, (normed, self.weight(matrix)), logits)
        yield Operator("loss", group, 0.0, (logits,), (d_logits,) if training else (), 1)
        if training:
            d_normed = self.stream("head input gradient")
            yield from self.products_back(matrix, group, d_logits, normed, d_normed)
            writes = (self.gradient(x), *map(self.gradient, norm))
            yield Operator("final norm backward", group, 0.0, (d_normed, x, *norm), writes, 1)

    def optimizer(self) -> Iterator[Operator]:
        """Yield the global norm of the gradients, which the update needs, and AdamW on float32
        parameters and moments, which also writes the parameters in the dtype of the products."""
        values, size = stored_values(self.layout, self.setting), self.setting.value_bytes

        def array(name: str, value_bytes: int) -> Tensor:
            return Tensor(name, "weight", values * value_bytes, 1)

        gradients, names = array("gradients", size), ("parameters", "mean", "square")
        state = [array(name, _FLOAT32) for name in names]
        updated = [array(f"updated {name}", _FLOAT32) for name in names]
        if size < _FLOAT32:
            updated.append(array("parameters for products", size))
        yield Operator("gradient norm", "gradient norm", 0.0, (gradients,), (), 1)
        yield Operator("update", "update", 0.0, (gradients, *state), (*updated,), 1)
