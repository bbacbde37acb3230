"""Small forward passes replayed as graphs: the same bits as without, whatever ran before."""

import copy
import pickle
import weakref

import pytest
import torch

from proteinbert_fast import GraphedForward, ProteinBert, Tokenizer, forget_prepared_weights, graphs
from proteinbert_fast.errors import BackendError, InputError
from proteinbert_fast.tokenizer import GAP

from .conftest import IS_INTERPRETED
from .fake_cuda import FakeCuda, Operations
from .test_model import SMALL

BATCHES = [["MKTAYIAKQRQISFVKSHFSRQ"], ["M", "", "ACDEFGHIKLMNPQRSTVWY" * 9], ["A" * 40], ["", "W" * 130, "K" * 3]]


@pytest.fixture
def cuda(monkeypatch) -> FakeCuda | None:
    """On a GPU the real thing, and None."""
    if not IS_INTERPRETED:
        return None
    fake = FakeCuda()
    fake.install(monkeypatch)
    monkeypatch.setattr(graphs, "ROWS", 64)
    return fake


@pytest.fixture
def graphed(device, cuda) -> GraphedForward:
    torch.manual_seed(0)
    return GraphedForward(ProteinBert(SMALL, backend="triton").to(device).eval())


def check(graphed: GraphedForward, sequences, device, **options) -> None:
    batch = Tokenizer()(sequences, ids=[str(i) for i in range(len(sequences))])
    out = graphed(batch, **options)
    # Of a model in training mode nothing is kept from call to call.
    model = copy.deepcopy(graphed.model).train()
    with torch.no_grad():
        plain = model(batch.to(device), **options)
    assert out.batch.ids == batch.ids
    for name in ("tokens", "starts", "lengths", "segments"):
        assert torch.equal(getattr(out.batch, name), getattr(plain.batch, name)), name
    for name in ("local_rows", "global_state", "go_probabilities", "token_logits"):
        assert torch.equal(getattr(out, name), getattr(plain, name)), name
    assert torch.equal(out.residue_mean(), plain.residue_mean())
    assert torch.equal(out.local[0], plain.local[0])
    for name in ("hidden_local", "hidden_global", "attentions"):
        assert (getattr(out, name) is None) == (getattr(plain, name) is None)
        for a, b in zip(getattr(out, name) or (), getattr(plain, name) or (), strict=True):
            assert torch.equal(a, b)


def test_inference_mode_once_and_not_again(graphed, device):
    """Buffers of a first call in inference mode are written outside it."""
    batch = Tokenizer()(BATCHES[0])
    with torch.inference_mode():
        first = graphed(batch).local_rows.clone()
    with torch.no_grad():
        assert torch.equal(graphed(batch).local_rows, first)
    assert torch.equal(graphed(batch).local_rows, first)


def test_same_bits_as_the_model(graphed, device):
    for sequences in (*BATCHES, BATCHES[0], BATCHES[2]):
        check(graphed, sequences, device)
    assert {(size.rows, size.proteins) for size in graphed._graphs} >= {(graphs.ROWS * -(-62 // graphs.ROWS), 1)}
    check(graphed, BATCHES[1], device, hidden_states=True, attentions=True)


def test_results_outlive_the_next_replay(graphed):
    batch = Tokenizer()(["MKT"])
    first = graphed(batch)
    kept = first.local_rows.clone()
    graphed(Tokenizer()(["WWW"]))
    assert torch.equal(first.local_rows, kept)
    assert torch.equal(first.batch.tokens.cpu(), batch.tokens)
    assert len(pickle.dumps(first.batch)) < 1000  # without the rest of a graph's inputs


def in_place(model) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)


def fused_step(model) -> None:
    """PyTorch's fused optimizers do not count their writes."""
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.AdamW(model.parameters(), lr=0.1, fused=True).step()


def swap_and_eval(model) -> None:
    for p in model.parameters():
        p.data.mul_(1.5)
    model.eval()


def swap_and_say_so(model) -> None:
    for p in model.parameters():
        p.data.mul_(1.5)
    forget_prepared_weights()


@pytest.mark.parametrize("change", [in_place, fused_step, swap_and_eval, swap_and_say_so], ids=lambda f: f.__name__)
def test_weights_that_change_are_seen_without_a_new_graph(graphed, device, change):
    """By a replay, which runs no Python: what was made of the weights is made again where the graph reads it."""
    batches = [Tokenizer()(["MKT"]), Tokenizer()(["M", "KT"])]
    before = [graphed(batch).local_rows for batch in batches]
    captured = dict(graphed._graphs)
    for _ in range(2):
        change(graphed.model)
        for batch, old in zip(batches, before, strict=True):
            assert not torch.equal(graphed(batch).local_rows, old)
        check(graphed, ["MKT"], device)
        check(graphed, ["M", "KT"], device)
    assert graphed._graphs.items() == captured.items()
    assert len(captured) == 2


@pytest.mark.slow
def test_weights_that_move_are_seen(graphed, device):
    batch = Tokenizer()(["MKT"])
    graphed(batch)
    graphed.model.to(torch.bfloat16)
    assert graphed(batch).local_rows.dtype == torch.bfloat16
    check(graphed, ["MKT"], device)


def test_a_weight_replaced_at_the_same_address(graphed, device):
    """Only its weak reference tells it from the old one."""
    graphed(Tokenizer()(["MKT"]))
    conv = graphed.model.blocks[1].wide_conv
    with torch.no_grad():
        conv.weight.mul_(2)
    conv.weight = torch.nn.Parameter(conv.weight.detach())
    check(graphed, ["MKT"], device)


def test_in_training_mode_any_write_is_seen(graphed, device):
    graphed(Tokenizer()(["MKT"]))
    graphed.model.train()
    for _ in range(2):
        for p in graphed.model.parameters():
            p.data.mul_(1.5)
        check(graphed, ["MKT"], device)
    assert len(graphed._graphs) == 1


def test_weights_that_change_during_a_capture(graphed, device, monkeypatch):
    plain = graphs._captured

    def captured(*arguments):
        found = plain(*arguments)
        in_place(graphed.model)
        return found

    monkeypatch.setattr(graphs, "_captured", captured)
    check(graphed, ["MKT"], device)


@pytest.mark.slow
def test_under_autocast(graphed, device):
    """Where the first block's states of tokens are cast again in every call, and in every replay."""
    with torch.autocast(device.type, torch.bfloat16):
        for change in (lambda model: None, in_place):
            change(graphed.model)
            check(graphed, ["MKT"], device)
            check(graphed, ["M", "KT"], device)


@pytest.mark.slow
def test_what_no_graph_is_made_for_runs_as_ever(graphed, device, monkeypatch):
    monkeypatch.setattr(graphs, "MOST_ROWS", 64)
    monkeypatch.setattr(graphs, "MOST_PROTEINS", 2)
    for sequences in (["A" * 200], ["A", "C", "D"]):
        check(graphed, sequences, device)
    batch = Tokenizer()(["MKT"])
    annotations = torch.ones(1, SMALL.n_annotations, device=device)
    with torch.no_grad():
        plain = graphed.model(batch.to(device), annotations)
    assert torch.equal(graphed(batch, annotations).global_state, plain.global_state)
    seen = []
    graphed(batch, attentions=lambda block, protein, weights: seen.append((block, protein, weights.shape)))
    assert seen == [(block, 0, (5, SMALL.n_heads)) for block in range(SMALL.n_blocks)]
    assert not graphed._graphs


def test_models_that_cannot_be_captured_are_refused(device, monkeypatch):
    with pytest.raises(BackendError, match="the model is on cpu, CUDA graphs need a CUDA GPU"):
        GraphedForward(ProteinBert(SMALL))
    monkeypatch.setattr(graphs, "_can_capture", lambda device: True)
    with pytest.raises(BackendError, match="needs the Triton kernels, but the back end is reference"):
        GraphedForward(ProteinBert(SMALL, backend="reference"))
    monkeypatch.setattr(torch.cuda, "current_stream", None)
    with pytest.raises(InputError, match="most_graphs must be from 1, got 0"):
        GraphedForward(ProteinBert(SMALL, backend="triton").to(device), most_graphs=0)


def test_tokens_that_lie_on_the_device(graphed, device, monkeypatch):
    if IS_INTERPRETED:
        monkeypatch.setattr(graphs, "_is_on_host", lambda tokens: False)
    for sequences in (["A" * 40], ["MKT"]):
        batch = Tokenizer()(sequences).to(device)
        out = graphed(batch)
        assert out.batch is batch
        assert (graphed._graphs[next(reversed(graphed._graphs))].inputs.batch().tokens[batch.n_rows :] == GAP).all()
        with torch.no_grad():
            assert torch.equal(out.local_rows, graphed.model(batch).local_rows)


only_interpreted = pytest.mark.skipif(not IS_INTERPRETED, reason="looks at a stand-in for torch.cuda")


@only_interpreted
class TestOnAStandIn:
    """What cannot be seen from results: arguments, order, and what is waited for."""

    A, B, C = (Tokenizer()([sequence]) for sequence in ("MKT", "A" * 60, "A" * 120))  # a graph for each

    def numbers_of(self, graphed) -> list[int]:
        return [graph.replay.__self__.number for graph in graphed._graphs.values()]

    def test_operations_of_a_call(self, graphed, cuda):
        """Of 2 blocks. Weights rearranged in every replay, or a layout made on the device, would be dozens more."""
        graphed(self.A)
        (graph,) = graphed._graphs.values()
        gaps, first_states = ["aten.fill_.Tensor"] * SMALL.n_blocks, ["aten.gelu.default"]
        assert sorted(graph.replay.__self__.recorder.launches()) == gaps + first_states
        graph.replay = lambda: None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(graphs, "_pinned", lambda n_bytes: cuda.pinned[0])
            with Operations() as seen:
                graphed(self.A)
            patch.setattr(graphs, "_is_on_host", lambda tokens: False)
            with Operations() as seen_on_device:
                graphed(self.A)
        results = ["aten.clone.default"] * 3
        assert sorted(seen.launches()) == [*results, "aten.clone.default", "aten.copy_.default"]
        assert sorted(seen_on_device.launches()) == [*results, *["aten.copy_.default"] * 2, "aten.fill_.Tensor"]

    def test_captures_are_of_their_thread_and_share_memory(self, graphed, cuda):
        for batch in (self.A, self.B, self.C):
            graphed(batch)
        assert [arguments["capture_error_mode"] for arguments in cuda.captures] == ["thread_local"] * 3
        assert len({(arguments["pool"], arguments["stream"]) for arguments in cuda.captures}) == 1
        assert cuda.captures[0]["pool"] == (0, 1)
        tokens = graphed._graphs[next(iter(graphed._graphs))].inputs.batch().tokens
        assert tokens.tolist() == self.A.tokens.tolist() + [GAP] * (len(tokens) - self.A.n_rows)

    def test_the_least_recently_used_graph_goes(self, graphed, cuda):
        graphed.most_graphs = 2
        for batch in (self.A, self.B, self.A):
            graphed(batch)
        last_use_of_b = graphed._graphs[next(iter(graphed._graphs))].done.number
        cuda.log.clear()
        graphed(self.C)
        assert self.numbers_of(graphed) == [1, 3]
        gone = cuda.log.index("destroy 2")
        assert cuda.log[gone - 1] == f"host waits for {last_use_of_b}"
        assert gone < cuda.log.index("capture 3")
        assert cuda.n_pools == 1

    def test_a_pool_ends_with_its_last_graph(self, graphed, cuda):
        """PyTorch gives an error when a pool that no graph uses any more is captured into."""
        graphed.most_graphs = 1
        for batch in (self.A, self.B):
            graphed(batch)
        assert [arguments["pool"] for arguments in cuda.captures] == [(0, 1), (0, 2)]
        graphed.model.to(torch.bfloat16)
        graphed(self.B)
        assert cuda.captures[2]["pool"] == (0, 3)

    def test_graphs_of_weights_that_moved_end_after_their_last_use(self, graphed, cuda):
        for batch in (self.A, self.B, self.A):
            graphed(batch)
        done = {graph.replay.__self__.number: graph.done.number for graph in graphed._graphs.values()}
        cuda.log.clear()
        graphed.model.to(torch.bfloat16)
        graphed(self.A)
        for number, event in done.items():
            gone = cuda.log.index(f"destroy {number}")
            assert cuda.log[gone - 1] == f"host waits for {event}"
            assert gone < cuda.log.index("capture 3")

    def test_graphs_end_with_what_made_them_after_their_last_use(self, cuda, device):
        graphed = GraphedForward(ProteinBert(SMALL, backend="triton").to(device).eval())
        graphed(self.A)
        event, there = graphed._done.number, weakref.ref(graphed)
        del graphed
        assert there() is None
        assert cuda.log[-2:] == [f"host waits for {event}", "destroy 1"]

    def test_replays_come_one_after_another(self, graphed, cuda, monkeypatch):
        """Also of different graphs on different streams; a call ends with the copies of its results."""
        plain = graphs._part_of

        def part_of(*arguments):
            cuda.log.append("copy")
            return plain(*arguments)

        monkeypatch.setattr(graphs, "_part_of", part_of)
        plain_write = graphs._Inputs.write

        def write(*arguments) -> None:
            cuda.log.append("write")
            plain_write(*arguments)

        monkeypatch.setattr(graphs._Inputs, "write", write)
        for batch in (self.A, self.B):
            graphed(batch)
        last = graphed._done.number
        for batch in (self.A, self.B):
            stream = cuda.stream()
            cuda.log.clear()
            with cuda.on(stream):
                graphed(batch)
            graph = self.numbers_of(graphed)[-1]
            own = [line for line in cuda.log if line != f"{stream.name} keeps memory"]
            assert own[0] == f"{stream.name} waits for {last}"
            last = graphed._done.number
            assert own[-4:] == ["write", f"replay {graph} on {stream.name}", "copy", f"{stream.name} records {last}"]

    def test_a_call_that_fails_is_waited_for(self, graphed, cuda, monkeypatch):
        """Its replay runs, though its results were not copied."""
        graphed(self.A)
        monkeypatch.setattr(graphs, "_part_of", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            graphed(self.A)
        assert cuda.log[-2:] == [f"replay 1 on {cuda.current.name}", f"{cuda.current.name} records {cuda.n_events}"]
        assert graphed._done.number == cuda.n_events

    def test_weights_are_made_again_between_replays(self, graphed, cuda):
        graphed(self.A)
        last = graphed._done.number
        in_place(graphed.model)
        cuda.log.clear()
        graphed(self.A)
        made = [i for i, line in enumerate(cuda.log) if " records " in line][:-1]
        assert made
        assert cuda.log.index(f"{cuda.current.name} waits for {last}") < min(made)
        assert max(made) < cuda.log.index(f"replay 1 on {cuda.current.name}")

    def test_pinned_memory_is_never_written_to_again(self, graphed, cuda):
        """The copy from it may not have begun when the next call writes."""
        graphed(self.A)
        n, before = len(cuda.pinned), [host.clone() for host in cuda.pinned]
        graphed(Tokenizer()(["WWW"]))
        graphed(self.A)
        assert len(cuda.pinned) == n + 2
        assert all(torch.equal(a, b) for a, b in zip(cuda.pinned, before, strict=False))

    def test_inputs_are_aligned(self, graphed, cuda):
        graphed(self.C)
        (graph,) = graphed._graphs.values()
        batch = graph.inputs.batch()
        ((span, (span_protein, first_span)),) = batch._spans.items()
        assert span == 512
        views = [batch.tokens, batch.starts, batch.lengths, batch.segments, span_protein, first_span]
        base = views[0].untyped_storage().data_ptr()
        assert {view.untyped_storage().data_ptr() for view in views} == {base}
        assert all((view.data_ptr() - base) % 256 == 0 for view in views)
