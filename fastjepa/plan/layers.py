"""What an implementation moves through memory and keeps for the backward pass, beside its matrix products.

Every operation of a transformer layer is one line here: the values that it reads and writes forward and backward for a
token, and those that it keeps. The traffic of the products with weights is not counted: they are bound by arithmetic at
the widths that are trained, and what they lose is in the efficiencies.

Under autocast to bf16 the residual stream stays fp32 and the branches are bf16; the lines named "cast" are there only
then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

IMPLEMENTATIONS = ("fastjepa", "compiled", "eager")


class Precision(NamedTuple):
    """Bytes of a number in the residual stream, and in the branches that are added to it."""

    stream: int
    branch: int

    @property
    def mixed(self) -> bool:
        """Whether numbers are cast between the two."""
        return self.stream != self.branch


FP32, AUTOCAST, BF16 = Precision(4, 4), Precision(4, 2), Precision(2, 2)


class Values(NamedTuple):
    """Numbers a token.

    Attributes:
        stream: of the residual stream, times the width. branch, hidden: of the branches, times the width and times the
            MLP's hidden width. weights, weights32: of attention, for each head and token attended to, in the branches'
            precision and in fp32. heads, ones: in fp32, one for each head, and single ones.
    """

    stream: float = 0
    branch: float = 0
    hidden: float = 0
    weights: float = 0
    weights32: float = 0
    heads: float = 0
    ones: float = 0

    def bytes(self, shape: Shape, tokens: float, squares: float, precision: Precision) -> float:
        """Of so many tokens, in sequences whose squared lengths add up to `squares`."""
        wide, narrow = precision
        row = shape.width * (wide * self.stream + narrow * (self.branch + shape.mlp_ratio * self.hidden))
        pair = shape.heads * (narrow * self.weights + 4 * self.weights32)
        return tokens * (row + 4 * (shape.heads * self.heads + self.ones)) + squares * pair


@dataclass(frozen=True)
class Shape:
    """Of a layer: its width, attention heads, and hidden width over the width."""

    width: int
    heads: int
    mlp_ratio: float


class Operation(NamedTuple):
    """One of a layer: what it moves forward and backward, and keeps in between.

    Attributes:
        mixed: whether it is there only where stream and branches differ in precision.
    """

    name: str
    forward: Values
    backward: Values
    kept: Values = Values()
    mixed: bool = False


@dataclass(frozen=True)
class Layer:
    """The operations of a transformer layer: up to attention, and those behind it, which treat tokens one by one."""

    attention: tuple[Operation, ...]
    tail: tuple[Operation, ...]

    def bytes(
        self, what: str, shape: Shape, tokens: float, squares: float, precision: Precision, tail: float | None = None
    ) -> float:
        """Bytes moved "forward" or "backward", or "kept".

        tail: tokens that what is behind attention is done for, all of them unless given.
        """
        return sum(
            getattr(operation, what).bytes(shape, count, squares, precision)
            for operations, count in ((self.attention, tokens), (self.tail, tokens if tail is None else tail))
            for operation in operations
            if precision.mixed or not operation.mixed
        )


_CAST = Operation("cast", Values(stream=1, branch=1), Values(stream=1, branch=1), mixed=True)

# As `fastjepa.nn` runs with its kernels: what those move is what their `*_cost` say, which a test holds.
# A layer's first norm adds the branch of the layer before. Backward makes the norms' outputs again, for the gradients
# of qkv and fc1, and the second's sum, of the first's and the branch.
_ADD_NORM = Operation(
    "add, layer_norm",
    Values(stream=2, branch=2, ones=2),
    Values(stream=3, branch=2, ones=2),
    Values(stream=1, ones=2),
)
_FASTJEPA = Layer(
    attention=(
        _ADD_NORM,
        Operation("its gradient, written for the branch too", Values(), Values(branch=1), mixed=True),
        Operation("qkv", Values(), Values(branch=3)),  # backward: the bias's gradient, as below
        Operation("attention", Values(branch=4, heads=1), Values(branch=8, heads=1), Values(branch=4, heads=1)),
    ),
    tail=(
        Operation("proj", Values(), Values(branch=1)),
        _ADD_NORM._replace(kept=Values(branch=1, ones=2)),
        Operation("its gradient, written for the branch too, its sum again", Values(), Values(branch=2), mixed=True),
        Operation("fc1", Values(), Values()),
        Operation("bias_gelu", Values(hidden=2), Values(hidden=4), Values(hidden=1)),  # made again for fc2's gradient
        Operation("fc2", Values(), Values(branch=1)),
    ),
)

# As the published code runs: attention's weights written out, in fp32 for the softmax.
_EAGER = Layer(
    attention=(
        Operation("layer_norm", Values(stream=2, ones=2), Values(stream=3, ones=2), Values(stream=1, ones=2)),
        _CAST,
        Operation("qkv", Values(), Values(branch=3), Values(branch=1)),
        Operation("q, k and v copied for the products", Values(branch=6), Values(branch=12), Values(branch=3)),
        Operation("products of tokens", Values(branch=4, weights=2), Values(branch=8, weights=4)),
        Operation("scale", Values(weights=2), Values(weights=2)),
        Operation("softmax", Values(weights32=2), Values(weights32=3), Values(weights32=1)),
        Operation(
            "casts about the softmax",
            Values(weights=2, weights32=2),
            Values(weights=2, weights32=2),
            Values(weights=1),
            mixed=True,
        ),
        Operation("heads side by side", Values(branch=2), Values(branch=2), Values(branch=1)),
        Operation("two gradients of the stream added", Values(), Values(stream=3)),
    ),
    tail=(
        Operation("proj", Values(), Values(branch=1)),
        Operation("add", Values(stream=2, branch=1), Values(), Values(stream=1)),
        _CAST._replace(forward=Values()),
        Operation("layer_norm", Values(stream=2, ones=2), Values(stream=3, ones=2), Values(ones=2)),
        _CAST,
        Operation("fc1", Values(), Values(hidden=1), Values(branch=1)),
        Operation("gelu", Values(hidden=2), Values(hidden=3), Values(hidden=1)),
        Operation("fc2", Values(), Values(branch=1), Values(hidden=1)),
        Operation("add", Values(stream=2, branch=1), Values(stream=3)),
        _CAST._replace(forward=Values()),
    ),
)

# As torch.compile fuses it: about one kernel from each product to the next, and no more kept than has to be.
_NORM = Operation(
    "add, layer_norm, cast", Values(stream=2, branch=2), Values(stream=4, branch=4), Values(stream=1, ones=2)
)
_COMPILED = Layer(
    attention=(
        _NORM,
        Operation("qkv", Values(), Values(branch=3)),
        Operation("attention", Values(branch=4, heads=1), Values(branch=8, heads=1), Values(branch=4, heads=1)),
    ),
    tail=(
        Operation("proj", Values(), Values(branch=1)),
        _NORM,
        Operation("fc1", Values(), Values(hidden=1)),
        Operation("gelu", Values(hidden=2), Values(hidden=4), Values(hidden=1)),
        Operation("fc2", Values(), Values(branch=1)),
    ),
)

LAYERS = {"fastjepa": _FASTJEPA, "compiled": _COMPILED, "eager": _EAGER}
