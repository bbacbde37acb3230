"""The kernels, each in one entry: how it is called, what it must give, what it has to do. A new kernel is a new entry.

The same list feeds the checks on the device, the timings of single kernels and the cost model's predictions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from proteinbert_fast.benchmark import cost_model
from proteinbert_fast.benchmark.cases import Check
from proteinbert_fast.benchmark.cost_model import Cost, Size
from proteinbert_fast.benchmark.gpu.precision import Precision
from proteinbert_fast.config import VOCABULARY_SIZE, ProteinBertConfig
from proteinbert_fast.model import Block
from proteinbert_fast.ops import reference
from proteinbert_fast.ops.reference import Embedded, Message
from proteinbert_fast.packing import PackedBatch
from proteinbert_fast.tokenizer import Tokenizer

# Of errors, relative to 1 + |right|. float32: rounding in sums of 1,152 numbers near 1, then a norm. The others: a few
# times the distance between numbers near 4, because two or three rounded intermediates meet in a norm's output of that
# size; products in TF32 round their operands to as many bits as float16 has.
TOLERANCE = {"float32": 2e-5, "tf32": 0.008, "float16": 0.008, "bfloat16": 0.06}
SPAN = 512  # of attention; only the cost model wants to know


class Inputs:
    """One block with random weights and states for it, in a precision, and the same block in float64.

    Args:
        config: sizes of the block.
        residues: of each protein.
        precision: to compute in.
        device: of all tensors.
        exact_device: of the float64 block.
    """

    def __init__(
        self,
        config: ProteinBertConfig,
        residues: Sequence[int],
        precision: Precision,
        device: torch.device,
        exact_device: torch.device,
    ) -> None:
        self.config, self.precision, self.device, self.exact_device = config, precision, device, exact_device
        dtype = precision.dtype
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.block = self._random(Block(config), dtype)
            self.token_head = self._random(nn.Linear(config.d_local, VOCABULARY_SIZE), dtype)
            self.annotation_head = self._random(nn.Linear(config.d_global, config.n_annotations), dtype)
        self.batch: PackedBatch = Tokenizer(gap=config.reach)([b"M" * n for n in residues]).to(device)
        generator = torch.Generator(device).manual_seed(len(residues))
        inside = (self.batch.segments >= 0).unsqueeze(-1)

        def states(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device, generator=generator).to(dtype)

        self.rows = states(self.batch.n_rows, config.d_local) * inside
        self.word = states(len(self.batch), config.d_local)
        self.state = states(len(self.batch), config.d_global)
        # About what tanh leaves; the kernels take it in float32 whatever the states are in.
        query = torch.tanh(states(len(self.batch), config.n_heads * config.d_key).float())
        self.message = Message(query, self.word)
        self.embedded = Embedded(self.batch.tokens, states(VOCABULARY_SIZE, config.d_local))

    def _random(self, layer: nn.Module, dtype: torch.dtype) -> nn.Module:
        """Weights that leave states about 1 in size; biases and norms that show whether they are used."""
        for name, p in layer.named_parameters():
            std = 1.0 if "norm" in name else 0.3 if p.dim() == 1 else p[0].numel() ** -0.5
            nn.init.normal_(p, std=std)
        return layer.to(self.device, dtype).requires_grad_(False)

    @property
    def size(self) -> Size:
        """For the cost model."""
        batch = self.batch
        spans = int((-(-batch.host_lengths // SPAN)).sum())
        return Size(batch.n_tokens, batch.n_rows, len(batch), spans, self.precision.dtype.itemsize)

    def exact(self) -> "Inputs":
        """The same numbers in float64, where the reference is computed."""
        twin: Inputs = object.__new__(Inputs)
        twin.config, twin.precision = self.config, self.precision
        twin.device = twin.exact_device = self.exact_device
        for name in ("block", "token_head", "annotation_head"):
            layer: nn.Module = getattr(self, name)
            weight = layer.state_dict().get("weight")
            copy = Block(self.config) if weight is None else nn.Linear(weight.shape[1], weight.shape[0])
            copy = copy.to(self.exact_device, torch.float64).requires_grad_(False)
            copy.load_state_dict(layer.state_dict())
            setattr(twin, name, copy)
        for name in ("rows", "word", "state"):
            setattr(twin, name, getattr(self, name).to(self.exact_device, torch.float64))
        twin.batch = self.batch.to(self.exact_device)
        twin.message = Message(self.message.query.to(self.exact_device, torch.float64), twin.word)
        twin.embedded = Embedded(twin.batch.tokens, self.embedded.weight.to(self.exact_device, torch.float64))
        return twin


Tensors = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Operation:
    """A kernel, or the few that one public function launches.

    Attributes:
        name: of the function, and what is asked of it.
        run: calls it.
        exact: the same from ``ops.reference``, on float64 inputs.
        cost: what it has to do, given the size and a precision's name and tile; see `tile_rows`.
        note: what a reader must know.
        by_largest: errors are of the largest number of each tensor, not of 1 and each number.
        defined: what is compared of results, which may hold anything in gap rows.
    """

    name: str
    run: Callable[[Inputs], Tensors]
    exact: Callable[[Inputs], Tensors]
    cost: Callable[[Inputs], Cost]
    note: str = ""
    by_largest: bool = False
    defined: Callable[[Inputs, Tensors], Tensors] = lambda _, found: found


def tile_rows(inputs: Inputs, kernel: str = "local_block") -> int:
    """Rows of a tile, in the configuration that would run."""
    import sys

    from proteinbert_fast.ops import kernels
    from proteinbert_fast.ops.kernels.launching import capability_of
    from proteinbert_fast.ops.precision import product_precision

    module = sys.modules[f"{kernels.__name__}.{kernel}"]
    channels, dtype = inputs.config.d_local, inputs.precision.dtype
    capability = capability_of(inputs.rows)
    if kernel == "local_block" and tile_stays(inputs):
        from proteinbert_fast.ops.kernels import local_block_hopper

        return int(local_block_hopper.configuration(channels, dtype).rows)
    with inputs.precision.active():
        return int(module.configuration(capability, channels, dtype, product_precision(dtype)).rows)


def tile_stays(inputs: Inputs) -> bool:
    """Whether the kernel that would run keeps its tile of rows in shared memory."""
    from proteinbert_fast.ops.kernels.launching import capability_of
    from proteinbert_fast.ops.kernels.local_block import portable_because

    return portable_because(capability_of(inputs.rows), inputs.config.d_local, inputs.precision.dtype) is None


def _local_block(name: str, keep_hidden: bool = False, first: bool = False, note: str = "") -> Operation:
    def run(i: Inputs) -> Tensors:
        from proteinbert_fast.ops import kernels

        weights = i.block.local_weights()  # type: ignore[operator]
        x = i.embedded if first else i.rows
        return kernels.local_block(x, i.word, i.batch, weights, i.config.wide_dilation, keep_hidden)

    def exact(i: Inputs) -> Tensors:
        weights = i.block.local_weights()  # type: ignore[operator]
        x = reference.embed_tokens(*i.embedded) if first else i.rows
        right = reference.local_block(x, i.word, i.batch.segments, weights, i.config.wide_dilation)
        return (right.hidden if keep_hidden else None), right.local

    def cost(i: Inputs) -> Cost:
        if first:
            return cost_model.first_block(i.config, i.size, tile_rows(i))
        return cost_model.local_block(i.config, i.size, tile_rows(i), int(keep_hidden), tile_stays(i))

    return Operation(name, run, exact, cost, note)


def _global_track(name: str, last: bool = False, return_attention: bool = False, note: str = "") -> Operation:
    def run(i: Inputs) -> Tensors:
        from proteinbert_fast.ops import kernels

        found = kernels.global_track(
            i.rows,
            i.state,
            i.message,
            i.batch,
            i.block.global_weights(),  # type: ignore[operator]
            None if last else i.block.message_weights(),  # type: ignore[operator]
            i.config.n_heads,
            return_attention,
        )
        said = (found.residue_mean,) if last else tuple(found.message or ())
        return found.hidden, found.global_state, found.attention, *said

    def exact(i: Inputs) -> Tensors:
        weights, batch = i.block.global_weights(), i.batch  # type: ignore[operator]
        pooled, attention = reference.global_attention(
            i.rows, i.message.query, batch.segments, weights.key_weight, weights.value_weight, i.config.n_heads,
            return_attention,
        )  # fmt: skip
        hidden, state = reference.global_block(i.state, pooled, weights.block)
        if last:
            mean = reference.residue_mean(i.rows, batch.segments, batch.starts, batch.lengths)
            return hidden, state, attention, mean
        message = reference.message(state, i.block.message_weights())  # type: ignore[operator]
        return hidden, state, attention, *message

    def cost(i: Inputs) -> Cost:
        size, config = i.size, i.config
        done = cost_model.span_sums(config, size) + cost_model.add_spans(config, size)
        done += cost_model.global_track(config, size)
        if not last:
            done += cost_model.message(config, size)
        if return_attention:
            done += cost_model.attention_weights(config, size, tile_rows(i, "global_attention"))
        return done

    return Operation(name, run, exact, cost, note)


def _message() -> Operation:
    def run(i: Inputs) -> Tensors:
        from proteinbert_fast.ops import kernels

        return kernels.message(i.state, i.block.message_weights())  # type: ignore[operator]

    def exact(i: Inputs) -> Tensors:
        return reference.message(i.state, i.block.message_weights())  # type: ignore[operator]

    return Operation("message", run, exact, lambda i: cost_model.message(i.config, i.size), "to the first block")


def _residue_mean() -> Operation:
    def run(i: Inputs) -> Tensors:
        from proteinbert_fast.ops import kernels

        return (kernels.residue_mean(i.rows, i.batch),)

    def exact(i: Inputs) -> Tensors:
        return (reference.residue_mean(i.rows, i.batch.segments, i.batch.starts, i.batch.lengths),)

    return Operation("residue_mean", run, exact, lambda i: cost_model.residue_mean(i.config, i.size), "of states")


def _token_head() -> Operation:
    def run(i: Inputs) -> Tensors:
        from proteinbert_fast.ops import kernels

        return (kernels.head(i.token_head, i.rows, by_row=True),)  # type: ignore[arg-type]

    return Operation(
        "token head",
        run,
        lambda i: (i.token_head(i.rows),),
        lambda i: cost_model.token_head(i.config, i.size),
        "logits of every row",
    )


def _annotation_head() -> Operation:
    def run(i: Inputs) -> Tensors:
        from proteinbert_fast.ops import kernels

        return (kernels.head(i.annotation_head, i.state),)  # type: ignore[arg-type]

    return Operation(
        "annotation head",
        run,
        lambda i: (i.annotation_head(i.state),),
        lambda i: cost_model.annotation_head(i.config, i.size),
        "logits of every protein",
    )


OPERATIONS = (
    _local_block("local_block"),
    _local_block("local_block, hidden kept", keep_hidden=True, note="also writes the states after the first norm"),
    _local_block("local_block, first", first=True, note="takes tokens, not states"),
    _global_track("global_track", note="span sums, then one launch to the next block's query and broadcast"),
    _global_track("global_track, last", last=True, note="with the mean of the residues' states instead"),
    _global_track("global_track, with weights", return_attention=True, note="and the attention weights' pass"),
    _message(),
    _residue_mean(),
    _token_head(),
    _annotation_head(),
)


def error(found: Tensors, right: Tensors, by_largest: bool = False) -> float:
    """The largest error; NaN where a number is none, infinity where shapes differ.

    Args:
        found: by the kernels.
        right: by the reference.
        by_largest: relative to the largest number of each tensor, not to 1 + each number.
    """
    worst = 0.0
    for ours, exact in zip(found, right, strict=True):
        if ours is None or exact is None:
            if ours is not exact:
                return float("inf")
            continue
        if ours.shape != exact.shape:
            return float("inf")
        if ours.numel() == 0:
            continue
        theirs = exact.to(ours.device)
        size = theirs.abs().max().clamp(min=1e-12) if by_largest else 1 + theirs.abs()
        difference = ((ours.double() - theirs).abs() / size).max().item()
        # A comparison with NaN is false: it stays.
        worst = difference if not difference <= worst else worst
    return worst


def same(a: Tensors, b: Tensors) -> bool:
    """Whether two results have the same bits."""
    return all(
        x is y if x is None or y is None else x.dtype == y.dtype and torch.equal(x, y)
        for x, y in zip(a, b, strict=True)
    )


def compared(found: Tensors, right: Tensors, precision: str, by_largest: bool = False) -> Check:
    """A kernel's result against the reference's."""
    worst, allowed = error(found, right, by_largest), TOLERANCE[precision] * (2 if by_largest else 1)
    return Check(worst <= allowed, f"largest error {worst:.1e}, allowed {allowed:.2g}")
