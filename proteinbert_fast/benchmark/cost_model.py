"""What each GPU kernel has to do, and the time that takes at least: arithmetic, memory, cache, instructions.

A `Cost` counts what a launch does; divided by a device's `Peaks` it gives a time for each thing that may bound it. The
longest of them is the least time there can be, when everything overlaps perfectly. A second number, `Times.serial`,
adds products and other instructions up instead: that is what a multiprocessor takes on which one program runs at a time
and nothing overlaps. A measurement should lie between the two; where it does not, either the count or the kernel is
wrong.

What is counted, for a state of D channels of s bytes, T taps, tiles of M rows:

- **FLOPs** of the matrix products, two for each multiplication with addition. Summed over a forward pass they are
  `cases.flops_per_token`; what is done once per protein comes on top of it.
- **HBM bytes**: every input and output once. Tiles of neighbours share the rows between them through the L2 cache.
- **L2 bytes**: what programs fetch from the L2 cache: a local block reads its tile of rows again for each of the 2 T
  taps, and all 2 T + 1 weight matrices for each tile.
- **Instructions** of activations, norms and conversions, per number they are applied to, read off the formulas in
  ``ops/kernels/activations.py``, and special-function operations (powers of two, quotients) among them. Estimates.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from proteinbert_fast.config import VOCABULARY_SIZE, ProteinBertConfig

Bound = Literal["matrix", "HBM", "L2", "instructions"]

# Instructions per number, special-function operations in brackets: |x|, min, five steps of the polynomial, a power of
# two, a sum, two products with sums (1); a product, a power of two, a sum, a quotient of five, a difference (2).
GELU, GELU_SPECIAL = 11, 1
TANH, TANH_SPECIAL = 9, 2
# Per number: two sums over the row, a difference, two products with sums.
LAYER_NORM = 6
# GELU and its derivative: a second power of two, four products with sums, a select (2).
GELU_AND_SLOPE, GELU_AND_SLOPE_SPECIAL = 17, 2
# Two sums over the row, three products with sums.
LAYER_NORM_GRADIENT = 7
# Sum of two states, conversions from and to 16 bits, select, address: per number read or written.
MOVE = 3
_LANES, _SPECIAL_LANES = 128, 16  # instructions that a multiprocessor issues per clock


@dataclass(frozen=True)
class Peaks:
    """What a device can do at most.

    Attributes:
        name: of the device.
        matrix: FLOP/s of products by precision: "bfloat16", "float16", "tf32", "float32".
        hbm: bytes/s from and to device memory, read and written both counted.
        l2: bytes/s out of the L2 cache.
        multiprocessors: there are.
        clock: of the multiprocessors, Hz.
        source: where the numbers are from.
    """

    name: str
    matrix: Mapping[str, float]
    hbm: float
    l2: float
    multiprocessors: int
    clock: float
    source: str = "measured in the same run"


# Not measured by this package. Matrix and memory rates are what large products and copies were seen to reach; TF32 is
# half and float32 a thirteenth of bfloat16, as in the vendor's data sheet; the cache was seen at 5.5 to 7 TB/s.
_HOPPER = {"bfloat16": 790e12, "float16": 790e12, "tf32": 395e12, "float32": 60e12}
_ESTIMATE = "estimates for this kind of device, not measured here"
ESTIMATES = {
    "H100": Peaks("H100 SXM", MappingProxyType(_HOPPER), 3.0e12, 5.5e12, 132, 1.7e9, _ESTIMATE),
    "H200": Peaks("H200", MappingProxyType(_HOPPER), 4.3e12, 5.5e12, 132, 1.7e9, _ESTIMATE),
}


def estimated_peaks(device: str) -> Peaks:
    """Estimates for a device by its name; those of an H100 for one that is not known, which their name says."""
    return next((peaks for name, peaks in ESTIMATES.items() if name in device), ESTIMATES["H100"])


@dataclass(frozen=True)
class Times:
    """Seconds that each bound alone would take.

    Attributes:
        by_bound: of each.
        bound_by: the longest of them.
    """

    by_bound: dict[Bound, float]
    bound_by: Bound = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "bound_by", max(self.by_bound, key=lambda bound: self.by_bound[bound]))

    @property
    def least(self) -> float:
        """Everything overlaps: the longest alone."""
        return self.by_bound[self.bound_by]

    @property
    def serial(self) -> float:
        """Products and other instructions one after the other, unless memory or cache take longer still."""
        together = self.by_bound["matrix"] + self.by_bound["instructions"]
        return max(together, self.by_bound["HBM"], self.by_bound["L2"])


@dataclass(frozen=True)
class Cost:
    """What a launch does. Costs add up.

    Attributes:
        flops: of matrix products.
        hbm_bytes: from and to device memory.
        l2_bytes: from the L2 cache to multiprocessors and back.
        instructions: other than products, counted per number, not per warp.
        special: special-function operations among them.
    """

    flops: float = 0
    hbm_bytes: float = 0
    l2_bytes: float = 0
    instructions: float = 0
    special: float = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.flops + other.flops,
            self.hbm_bytes + other.hbm_bytes,
            self.l2_bytes + other.l2_bytes,
            self.instructions + other.instructions,
            self.special + other.special,
        )

    def __mul__(self, times: float) -> "Cost":
        return Cost(
            self.flops * times,
            self.hbm_bytes * times,
            self.l2_bytes * times,
            self.instructions * times,
            self.special * times,
        )

    def times(self, peaks: Peaks, precision: str) -> Times:
        """On a device, products in a precision ("bfloat16", "float16", "tf32", "float32")."""
        clocks = peaks.multiprocessors * peaks.clock
        issue = max(self.instructions / _LANES, self.special / _SPECIAL_LANES) / clocks
        return Times(
            {
                "matrix": self.flops / peaks.matrix[precision],
                "HBM": self.hbm_bytes / peaks.hbm,
                "L2": self.l2_bytes / peaks.l2,
                "instructions": issue,
            }
        )


@dataclass(frozen=True)
class Size:
    """Of a batch, and of a number in it.

    Attributes:
        tokens: of all proteins.
        rows: tokens and gap rows.
        proteins: there are.
        spans: that attention cuts the proteins into.
        itemsize: bytes per number of a state.
    """

    tokens: int
    rows: int
    proteins: int
    spans: int
    itemsize: int


def local_block(
    config: ProteinBertConfig, size: Size, tile_rows: int, n_kept: int = 0, tile_stays: bool = False
) -> Cost:
    """Both convolutions, dense layer, three GELUs, two norms. Gap rows are computed like others.

    ``n_kept`` counts what is written beside the new states: hidden states 1, both convolutions' results 2.
    Where ``tile_stays``, a tile of rows and its neighbours on both sides are read once and stay in shared memory, as in
    the kernel for Hopper. ``flops`` counts tokens only, as everywhere: gap rows are overhead, and show as a lower
    fraction of the peak.
    """
    d, s, products = config.d_local, size.itemsize, 2 * config.kernel_size + 1
    row = d * s
    states = 2 + n_kept  # one read, the others written
    weights = products * d * d * s
    numbers = size.rows * d
    reads = 1 + 2 * config.reach / tile_rows if tile_stays else 2 * config.kernel_size + 1
    return Cost(
        flops=2.0 * size.tokens * products * d * d,
        hbm_bytes=size.rows * (states * row + 4) + size.proteins * row + weights,
        # A tile per tap, the residual, the broadcast, the stores; and the weights for each tile.
        l2_bytes=size.rows * (reads + states) * row + size.rows / tile_rows * weights,
        instructions=numbers * (3 * GELU + 2 * LAYER_NORM + 3 * MOVE),
        special=numbers * 3 * GELU_SPECIAL,
    )


def first_block(config: ProteinBertConfig, size: Size, tile_rows: int, symbols: int = 32) -> Cost:
    """The first local block, from tokens: each tap is a product of 0s and 1s with what every token's states become.

    ``flops`` counts what is multiplied, which is less than for other blocks; the model's FLOPs count it like them.
    """
    d, s, taps = config.d_local, size.itemsize, 2 * config.kernel_size
    row = d * s
    weights = (taps * symbols + d) * d * s
    numbers = size.rows * d
    return Cost(
        flops=2.0 * size.tokens * (taps * symbols * d + d * d),
        hbm_bytes=size.rows * (row + 5) + size.proteins * row + weights,
        # A token per tap, the broadcast, the stores; and the weights for each tile.
        l2_bytes=size.rows * (taps + 1 + 2 * row) + size.rows / tile_rows * weights,
        instructions=numbers * (3 * GELU + 2 * LAYER_NORM + 3 * MOVE) + size.rows * taps * symbols,
        special=numbers * 3 * GELU_SPECIAL,
    )


def message(config: ProteinBertConfig, size: Size) -> Cost:
    """What a block hears of the global states: its query and its broadcast."""
    keys = config.n_heads * config.d_key
    query = linear(size.proteins, config.d_global, keys, size.itemsize, "tanh")
    return query + linear(size.proteins, config.d_global, config.d_local, size.itemsize, "gelu")


def residue_mean(config: ProteinBertConfig, size: Size) -> Cost:
    """Rows read once and added up."""
    moved = float(size.tokens * config.d_local * size.itemsize + 2 * size.spans * config.d_local * 4)
    return Cost(hbm_bytes=moved, l2_bytes=moved, instructions=size.tokens * config.d_local * MOVE)


def span_sums(config: ProteinBertConfig, size: Size) -> Cost:
    """Keys, values, logits and weighted sums of every span; a program per span and head reads the span's rows."""
    d, s, heads = config.d_local, size.itemsize, config.n_heads
    keys, values = heads * config.d_key, config.d_global
    sums = size.spans * (values + heads) * 4
    return Cost(
        flops=2.0 * size.tokens * (d * (keys + values) + keys + values),
        hbm_bytes=size.tokens * d * s + size.proteins * keys * 4 + (keys + values) * d * s + sums,
        l2_bytes=size.tokens * heads * d * s + size.spans * (keys + values) * d * s + sums,
        # A product with the query and a sum per key, a product with the weight, a sum and a select per value.
        instructions=size.tokens * (keys * (TANH + 2) + values * (GELU + 3)),
        special=size.tokens * (keys * TANH_SPECIAL + values * GELU_SPECIAL + heads),
    )


def add_spans(config: ProteinBertConfig, size: Size) -> Cost:
    """A protein's spans added up and divided."""
    sums = size.spans * (config.d_global + config.n_heads)
    moved = sums * 4 + size.proteins * (config.d_global * size.itemsize + config.n_heads * 4)
    return Cost(hbm_bytes=moved, l2_bytes=moved, instructions=sums)


def attention_weights(config: ProteinBertConfig, size: Size, tile_rows: int) -> Cost:
    """The second pass: keys again, each row's weights written. Every row reads its protein's query."""
    d, s, heads = config.d_local, size.itemsize, config.n_heads
    keys = heads * config.d_key
    return Cost(
        flops=2.0 * size.tokens * (d * keys + keys),
        hbm_bytes=size.rows * ((d + heads) * s + 4) + keys * d * s + size.proteins * keys * 4,
        l2_bytes=size.rows * (heads * d * s + keys * 4) + size.rows / tile_rows * keys * d * s,
        instructions=size.rows * (keys * (TANH + 2) + heads * MOVE),
        special=size.rows * (keys * TANH_SPECIAL + heads),
    )


def linear(
    n_rows: int,
    n_inputs: int,
    n_columns: int,
    itemsize: int,
    activation: str = "none",
    tile: tuple[int, int] = (16, 64),
) -> Cost:
    """A linear layer in tiles of rows and columns, bias and activation included."""
    weights, out = n_inputs * n_columns * itemsize, n_rows * n_columns * itemsize
    tiles = -(-n_rows // tile[0]), -(-n_columns // tile[1])
    instructions = {"none": 1, "gelu": GELU, "tanh": TANH, "sigmoid": TANH}[activation] + MOVE
    special = {"none": 0, "gelu": GELU_SPECIAL, "tanh": TANH_SPECIAL, "sigmoid": TANH_SPECIAL}[activation]
    return Cost(
        flops=2.0 * n_rows * n_inputs * n_columns,
        hbm_bytes=n_rows * n_inputs * itemsize + weights + out,
        l2_bytes=tiles[1] * n_rows * n_inputs * itemsize + tiles[0] * weights + out,
        instructions=n_rows * n_columns * instructions,
        special=n_rows * n_columns * special,
    )


def global_track(config: ProteinBertConfig, size: Size, tile_proteins: int = 16) -> Cost:
    """Both dense layers and norms of the global track; a program takes some proteins and reads all weights."""
    g, s = config.d_global, size.itemsize
    weights, states = 2 * g * g * s, 4 * size.proteins * g * s
    tiles = -(-size.proteins // tile_proteins)
    numbers = size.proteins * g
    return Cost(
        flops=4.0 * size.proteins * g * g,
        hbm_bytes=weights + states,
        l2_bytes=tiles * weights + states + 2 * numbers * s,
        instructions=numbers * 2 * (GELU + LAYER_NORM + MOVE),
        special=numbers * 2 * GELU_SPECIAL,
    )


def token_head(config: ProteinBertConfig, size: Size) -> Cost:
    """Logits of the tokens, of every row."""
    return linear(size.rows, config.d_local, VOCABULARY_SIZE, size.itemsize)


def annotation_head(config: ProteinBertConfig, size: Size) -> Cost:
    """Logits of the GO terms."""
    return linear(size.proteins, config.d_global, config.n_annotations, size.itemsize)


def convolution_gradient(config: ProteinBertConfig, size: Size, tile_rows: int, tile_stays: bool = False) -> Cost:
    """Of x: both convolutions' gradients and the sum's are read, the result written; weights as for `local_block`."""
    d, s, taps = config.d_local, size.itemsize, config.kernel_size
    row, matrices = d * s, 2 * taps * d * d
    reads = 2 + 4 * config.reach / tile_rows if tile_stays else 2 * taps
    return Cost(
        flops=2.0 * size.tokens * matrices,
        hbm_bytes=size.rows * 4 * row + matrices * s,
        l2_bytes=size.rows * (reads + 2) * row + size.rows / tile_rows * matrices * s,
        instructions=size.rows * d * 2 * MOVE,
    )


def convolution_weight_gradient(config: ProteinBertConfig, size: Size) -> Cost:
    """Of both convolutions' weights: a gradient and x for each, out of the cache once for every three taps.

    Three taps' sums of one of 44 parts of the rows are a program of the kernel for Hopper; parts are added up later.
    """
    row = config.d_local * size.itemsize
    parts = 2 * 2 * 44 * config.kernel_size * config.d_local**2 * 4
    return Cost(
        flops=2.0 * size.tokens * 2 * config.kernel_size * config.d_local**2,
        hbm_bytes=size.rows * 4 * row + parts,
        l2_bytes=size.rows * 4 * row * -(-config.kernel_size // 3) + parts,
    )


def local_block_gradient(config: ProteinBertConfig, size: Size, tile_rows: int, tile_stays: bool = False) -> Cost:
    """Pointwise part, gradient of x, gradients of all weights; the arguments are those of `local_block`."""
    return (
        pointwise(config, size)
        + convolution_gradient(config, size, tile_rows, tile_stays)
        + convolution_weight_gradient(config, size)
    )


def pointwise(config: ProteinBertConfig, size: Size, tile_rows: int = 32) -> Cost:
    """From the new state's gradient to both convolutions' results'; the dense layer's weights; the broadcast's sums.

    Reads x, both results and the gradient; writes five states, three of which are read again for those two.
    """
    d, s = config.d_local, size.itemsize
    row, numbers = d * s, size.rows * d
    return Cost(
        flops=2.0 * size.tokens * 3 * d * d,
        hbm_bytes=size.rows * (12 * row + 4 + 2 * 7 * d * 4 / tile_rows),
        # Both results twice, the broadcast, and the dense layer's weights for each tile.
        l2_bytes=size.rows * 15 * row + size.rows / tile_rows * d * row,
        instructions=numbers
        * (2 * GELU + 3 * GELU_AND_SLOPE + 2 * (LAYER_NORM + LAYER_NORM_GRADIENT) + 7 * 2 + 12 * MOVE),
        special=numbers * (2 * GELU_SPECIAL + 3 * GELU_AND_SLOPE_SPECIAL),
    )


def token_gradient(config: ProteinBertConfig, size: Size, symbols: int = 32) -> Cost:
    """Of the first local block's weights and of the embedding, by one-hot rows in place of x."""
    d, row = config.d_local, config.d_local * size.itemsize
    taps = 2 * config.kernel_size + 1
    return Cost(
        flops=2.0 * size.tokens * taps * symbols * d,
        hbm_bytes=size.rows * 3 * (row + 1),
        l2_bytes=size.rows * -(-taps // 3) * (row + 3),
        instructions=size.rows * taps * symbols,
    )


def attention_rows_gradient(config: ProteinBertConfig, size: Size, tile_rows: int = 128) -> Cost:
    """Of local states and queries, from keys and values that are computed again.

    Writes a softmax weight and a gradient per row and head too, in float32.
    """
    d, s, heads = config.d_local, size.itemsize, config.n_heads
    row, keys, values = d * s, heads * config.d_key, config.d_global
    return Cost(
        flops=2.0 * size.tokens * 2 * d * (keys + values),
        hbm_bytes=size.tokens * (2 * row + 8 * heads) + size.spans * keys * 4,
        l2_bytes=size.tokens * 2 * row + size.tokens / tile_rows * (keys + values) * row,
        # As forward, then products with query or gradient, and their sums.
        instructions=size.tokens * (keys * (TANH + 8) + values * (GELU_AND_SLOPE + 5)),
        special=size.tokens * (keys * TANH_SPECIAL + values * GELU_AND_SLOPE_SPECIAL + heads),
    )


def attention_weights_gradient(config: ProteinBertConfig, size: Size) -> Cost:
    """Of the key and value weights, from keys and values that are computed again; 128 of them to a program.

    264 programs have sums of their own, which are added up later.
    """
    d, s, heads = config.d_local, size.itemsize, config.n_heads
    row, keys, values = d * s, heads * config.d_key, config.d_global
    groups = -(-(keys + values) // 128)
    parts = 2 * (264 // groups) * (keys + values) * d * 4
    return Cost(
        flops=2.0 * size.tokens * 2 * d * (keys + values),
        hbm_bytes=size.tokens * (row + 8 * heads) + (keys + values) * row + parts,
        l2_bytes=size.tokens * groups * row + parts,
        instructions=size.tokens * (keys * (TANH + 5) + values * (GELU_AND_SLOPE + 1)),
        special=size.tokens * (keys * TANH_SPECIAL + values * GELU_AND_SLOPE_SPECIAL),
    )


def global_track_gradient(config: ProteinBertConfig, size: Size, tile_proteins: int = 16) -> Cost:
    """Both dense layers again, their gradients, and products over all proteins for all weights."""
    g, s, keys = config.d_global, size.itemsize, config.n_heads * config.d_key
    spoken = g * (keys + config.d_local)
    weights, numbers = (2 * g * g + spoken) * s, size.proteins * g
    tiles = -(-size.proteins // tile_proteins)
    return Cost(
        flops=2.0 * size.proteins * (6 * g * g + 2 * spoken + g * config.d_local),
        hbm_bytes=2 * weights + 14 * numbers * s,
        l2_bytes=2 * tiles * weights + 20 * numbers * s,
        instructions=numbers * 2 * (GELU_AND_SLOPE + LAYER_NORM + LAYER_NORM_GRADIENT + 4 * MOVE),
        special=numbers * 2 * GELU_AND_SLOPE_SPECIAL,
    )


def token_loss(config: ProteinBertConfig, size: Size) -> Cost:
    """Forward and backward: logits once and, for each 64 channels, again; then the gradients of states and head."""
    row = config.d_local * size.itemsize
    return Cost(
        flops=2.0 * size.tokens * (3 + -(-config.d_local // 64)) * config.d_local * VOCABULARY_SIZE,
        hbm_bytes=size.rows * (3 * row + 20),
        l2_bytes=size.rows * (6 * row + 20),
        instructions=size.rows * 32 * 2 * 8,
        special=size.rows * 32 * 2,
    )


def annotation_loss(config: ProteinBertConfig, size: Size) -> Cost:
    """Forward and backward: logits twice, slopes in memory, then two products with them."""
    g, n, s = config.d_global, config.n_annotations, size.itemsize
    numbers = size.proteins * n
    return Cost(
        flops=2.0 * 4 * numbers * g,
        hbm_bytes=numbers * (2 + 3 * s) + 3 * n * g * s + 3 * size.proteins * g * s,
        l2_bytes=2 * linear(size.proteins, g, n, s, tile=(64, 64)).l2_bytes + numbers * 3 * s,
        instructions=numbers * 2 * 20,
        special=numbers * 4,
    )


def optimizer_step(config: ProteinBertConfig) -> Cost:
    """LAMB on float32 weights: weight and moments read and written, gradient read, the step written and read twice."""
    moved = config.n_parameters * 4.0 * 10
    return Cost(hbm_bytes=moved, l2_bytes=moved, instructions=config.n_parameters * 20.0)


def block(config: ProteinBertConfig, size: Size, tile_rows: int) -> Cost:
    """All of one block: local block, attention, global track, message to the next."""
    return (
        local_block(config, size, tile_rows)
        + span_sums(config, size)
        + add_spans(config, size)
        + global_track(config, size)
        + message(config, size)
    )


def forward_seconds(
    config: ProteinBertConfig, size: Size, tile_rows: int, peaks: Peaks, precision: str, tile_stays: bool = False
) -> dict[Bound, float]:
    """Least seconds of a forward pass over a batch, by what bounds them; their sum is the prediction.

    Kernels run one after another, so their times add up. What is done once per protein is left out.
    """
    spent: dict[Bound, float] = {"matrix": 0.0, "HBM": 0.0, "L2": 0.0, "instructions": 0.0}
    for cost in (local_block(config, size, tile_rows, tile_stays=tile_stays), span_sums(config, size)):
        times = cost.times(peaks, precision)
        spent[times.bound_by] += config.n_blocks * times.least
    return spent


def training_costs(
    config: ProteinBertConfig, size: Size, tile_rows: int, tile_stays: bool = False
) -> dict[str, tuple[int, Cost]]:
    """A training step's launches by name: how many of each there are, and what each has to do.

    What autograd adds up on its own, the gradients of states that two operations read, is among them.

    Args:
        config: sizes of the model.
        size: of the batch.
        tile_rows: of the local block.
        tile_stays: as for `local_block`.
    """
    blocks, later = config.n_blocks, config.n_blocks - 1
    state = float(size.rows * config.d_local * size.itemsize)
    kept = Cost(hbm_bytes=2 * state, l2_bytes=2 * state)
    return {
        "local_block": (later, local_block(config, size, tile_rows, 2, tile_stays)),
        "local_block, first": (1, first_block(config, size, tile_rows) + kept),
        "span sums": (blocks, span_sums(config, size)),
        "global track": (blocks, global_track(config, size) + message(config, size)),
        "token loss": (1, token_loss(config, size)),
        "annotation loss": (1, annotation_loss(config, size)),
        "global track, gradient": (blocks, global_track_gradient(config, size)),
        "attention, rows' gradient": (blocks, attention_rows_gradient(config, size)),
        "attention, weights' gradient": (blocks, attention_weights_gradient(config, size)),
        "sum of gradients": (blocks, Cost(hbm_bytes=3 * state, l2_bytes=3 * state)),
        "pointwise gradient": (blocks, pointwise(config, size)),
        "x's gradient": (later, convolution_gradient(config, size, tile_rows, tile_stays)),
        "convolutions' weights' gradient": (later, convolution_weight_gradient(config, size)),
        "tokens' gradient": (1, token_gradient(config, size)),
        "optimizer": (1, optimizer_step(config)),
    }


def training_seconds(
    config: ProteinBertConfig, size: Size, tile_rows: int, peaks: Peaks, precision: str, tile_stays: bool = False
) -> dict[Bound, float]:
    """Least seconds of a training step on a batch, by what bounds its parts; their sum is the prediction."""
    spent: dict[Bound, float] = {"matrix": 0.0, "HBM": 0.0, "L2": 0.0, "instructions": 0.0}
    for times, cost in training_costs(config, size, tile_rows, tile_stays).values():
        least = cost.times(peaks, precision)
        spent[least.bound_by] += times * least.least
    return spent
