"""Offsets beyond 2**31 elements, without a GPU: the last programs of launches over memory that is hardly touched.

A short protein lies behind one of millions of residues. Only the programs at the end of a long grid run; the short
protein's numbers must be those that it has alone. On a GPU, test_model.py runs a whole model of that size.
"""

import builtins

import pytest
import torch

from proteinbert_fast import PackedBatch, ProteinBertConfig, Tokenizer
from proteinbert_fast.model import Block
from proteinbert_fast.ops import kernels
from proteinbert_fast.ops.kernels.linear import linear
from proteinbert_fast.ops.reference import Embedded, Message

from .conftest import IS_INTERPRETED

pytestmark = pytest.mark.skipif(not IS_INTERPRETED, reason="runs parts of launches, as only the interpreter can")

CONFIG = ProteinBertConfig(n_annotations=3, d_local=256, d_global=96, n_blocks=1, n_heads=2, d_key=32)
LONG, SHORT = 2**31 // 256 + 1, 67
LAST, MANY = 8, 64  # how many programs run, of launches of more than MANY


@pytest.fixture
def last_programs(monkeypatch):
    from triton.runtime import interpreter

    ran: list[int] = []

    def last(*bounds: int) -> builtins.range:
        whole = builtins.range(*bounds)
        if len(bounds) > 1 or len(whole) <= MANY:
            return whole
        ran.append(len(whole))
        return whole[-LAST:]

    # Loops over the grid are that module's own. Arguments lie in the CPU's memory, so there is nothing to copy back.
    monkeypatch.setattr(interpreter, "range", last, raising=False)
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
    return ran


class Pair:
    """The short protein alone, and behind the long one, whose states are zeros that no memory is spent on."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.block = Block(CONFIG).to(torch.bfloat16)
        for name, p in self.block.named_parameters():
            torch.nn.init.normal_(p, std=1.0 if "norm" in name else 0.3 if p.dim() == 1 else p[0].numel() ** -0.5)
        tokenizer, tail = Tokenizer(gap=CONFIG.reach), ("MKTAYIAKQR" * 7)[:SHORT]
        self.alone = tokenizer([tail])
        self.both = tokenizer(["A" * LONG, tail])
        assert self.both.n_rows * CONFIG.d_local > 2**31
        self.n_tail = self.alone.n_rows - CONFIG.reach  # the tokens and the gap behind them
        states = torch.randn(self.alone.n_rows, CONFIG.d_local)
        states[self.alone.segments < 0] = 0
        self.states = states.to(torch.bfloat16)
        self.word, self.state = torch.randn(1, CONFIG.d_local), torch.randn(1, CONFIG.d_global)
        self.query = torch.randn(1, CONFIG.n_heads * CONFIG.d_key).tanh()
        self.table = torch.randn(26, CONFIG.d_local).to(torch.bfloat16)

    def behind(self, states: torch.Tensor) -> torch.Tensor:
        rows = torch.zeros(self.both.n_rows, states.shape[1], dtype=states.dtype)
        rows[-self.n_tail :] = states[-self.n_tail :]
        return rows

    def same_tail(self, both: torch.Tensor, alone: torch.Tensor) -> bool:
        return both.data_ptr() != alone.data_ptr() and torch.equal(both[-self.n_tail :], alone[-self.n_tail :])

    def local_block(self, batch: PackedBatch, x: torch.Tensor | Embedded):
        word = self.word.expand(len(batch), -1).to(torch.bfloat16)
        with torch.no_grad():
            return kernels.local_block(x, word, batch, self.block.local_weights(), 5, keep_hidden=True)

    def global_track(self, batch: PackedBatch, local: torch.Tensor):
        word = self.word.expand(len(batch), -1).to(torch.bfloat16)
        message = Message(self.query.expand(len(batch), -1), word)
        with torch.no_grad():
            return kernels.global_track(
                local, self.state.expand(len(batch), -1).to(torch.bfloat16), message, batch,
                self.block.global_weights(), self.block.message_weights(), CONFIG.n_heads, True,
            )  # fmt: skip


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair()


@pytest.mark.parametrize("first", [False, True], ids=["states", "tokens"])
def test_local_block(pair, last_programs, first):
    hidden, local = pair.local_block(pair.alone, Embedded(pair.alone.tokens, pair.table) if first else pair.states)
    assert not last_programs
    x = Embedded(pair.both.tokens, pair.table) if first else pair.behind(pair.states)
    far_hidden, far_local = pair.local_block(pair.both, x)
    assert last_programs
    assert pair.same_tail(far_hidden, hidden)
    assert pair.same_tail(far_local, local)
    assert local[-pair.n_tail :].any()


def test_global_track(pair, last_programs):
    alone, both = pair.global_track(pair.alone, pair.states), pair.global_track(pair.both, pair.behind(pair.states))
    assert len(last_programs) >= 2  # spans, attention weights
    assert torch.equal(both.global_state[1], alone.global_state[0])
    assert torch.equal(both.message.broadcast[1], alone.message.broadcast[0])
    assert pair.same_tail(both.attention, alone.attention)
    assert alone.attention.any()


def test_residue_mean(pair, last_programs):
    alone = kernels.residue_mean(pair.states, pair.alone)
    both = kernels.residue_mean(pair.behind(pair.states), pair.both)
    assert last_programs
    assert torch.equal(both[1], alone[0])


def test_a_head_for_every_row(pair, last_programs):
    weight = torch.randn(26, CONFIG.d_local).to(torch.bfloat16)
    alone = linear(pair.states, weight, activation="softmax", by_row=True)
    both = linear(pair.behind(pair.states), weight, activation="softmax", by_row=True)
    assert last_programs
    assert pair.same_tail(both, alone)
