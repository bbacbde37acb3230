"""The original's numbers, made by running the published Keras code (tests/data/golden/README.md)."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from proteinbert_fast import PackedBatch, ProteinBert, Tokenizer
from proteinbert_fast.ops import reference

from .conftest import GOLDEN

# The golden numbers were computed in float64 and stored as float32; Keras itself in float32 is off by up to 7e-7
# (probabilities) and 2.7e-6 (hidden states).
TOLERANCE = {
    torch.float64: {"probabilities": 1e-7, "hidden": 1e-6, "attention": 1e-7},
    torch.float32: {"probabilities": 2e-6, "hidden": 8e-6, "attention": 2e-7},
}
UNPADDED = ["unp0", "unp1", "unp2", "unp3"]
BACKENDS = [("reference", torch.float64), ("reference", torch.float32), ("cpu", torch.float32)]


def as_tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def annotations_of(case: str, golden: dict[str, np.ndarray]) -> torch.Tensor:
    if case == "pad":
        return as_tensor(golden["pad_annotations"]).float()
    return as_tensor(golden["unpadded_annotations"][int(case[3:])][None]).float()


def check_forward(model: ProteinBert, golden: dict[str, np.ndarray], case: str) -> None:
    """Hidden states, probabilities and attention of one case, within the tolerance of the model's dtype."""
    dtype, device = model.token_embedding.weight.dtype, model.token_embedding.weight.device
    tolerance = TOLERANCE[dtype]
    with torch.no_grad():
        out = model(
            as_tensor(golden[f"{case}_tokens"]).to(device),
            annotations_of(case, golden).to(device),
            hidden_states=True,
            attentions=True,
        )
    local, global_ = as_tensor(golden[f"{case}_hidden_seq"]), as_tensor(golden[f"{case}_hidden_global"])
    n_annotations = model.config.n_annotations
    for ours, theirs, kind in [
        (out.original_local()[..., :-26], local[..., :-26], "hidden"),
        (out.token_probabilities, local[..., -26:], "probabilities"),
        (out.original_global()[:, :-n_annotations], global_[:, :-n_annotations], "hidden"),
        (out.go_probabilities, global_[:, -n_annotations:], "probabilities"),
        (torch.stack(out.attentions), as_tensor(golden[f"{case}_attention"]), "attention"),
    ]:
        torch.testing.assert_close(ours.cpu().double(), theirs.double(), atol=tolerance[kind], rtol=1e-6)


@pytest.mark.parametrize("case", ["pad", *UNPADDED])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_forward_equals_the_original(tiny_model, golden, case, backend, dtype):
    tiny_model.backend = backend
    check_forward(tiny_model.to(dtype), golden, case)


@pytest.mark.parametrize("case", UNPADDED)
def test_tokenizer_and_model_equal_the_original_from_the_sequence_on(tiny_model, golden, golden_meta, case):
    sequence = golden_meta["unpadded_sequences"][int(case[3:])]
    with torch.no_grad():
        out = tiny_model(Tokenizer()([sequence]), annotations_of(case, golden), hidden_states=True)
    torch.testing.assert_close(out.original_local(0), as_tensor(golden[f"{case}_hidden_seq"][0]), atol=8e-6, rtol=1e-6)
    torch.testing.assert_close(out.original_global(), as_tensor(golden[f"{case}_hidden_global"]), atol=8e-6, rtol=1e-6)


def test_lengths_give_the_answer_of_the_protein_alone(tiny_model, golden):
    """unp0..unp2 are pad rows 1..3 at their natural length."""
    tokens = as_tensor(golden["pad_tokens"])[1:]
    lengths = [golden[f"{case}_tokens"].shape[1] for case in UNPADDED[:3]]
    annotations = torch.cat([annotations_of(case, golden) for case in UNPADDED[:3]])
    mask = torch.arange(tokens.shape[1]) < torch.tensor(lengths)[:, None]
    for given in ({"lengths": lengths}, {"mask": mask}):
        with torch.no_grad():
            out = tiny_model(tokens, annotations, hidden_states=True, **given)
        for i, case in enumerate(UNPADDED[:3]):
            theirs = as_tensor(golden[f"{case}_hidden_seq"][0])
            torch.testing.assert_close(out.original_local()[i, : lengths[i], :-26], theirs[:, :-26], atol=8e-6, rtol=0)
            torch.testing.assert_close(
                out.original_global()[i], as_tensor(golden[f"{case}_hidden_global"][0]), atol=8e-6, rtol=1e-6
            )


def wrong_gelu(model, monkeypatch):
    monkeypatch.setattr(reference, "gelu", lambda x: F.gelu(x, approximate="tanh"))


def wrong_epsilon(model, monkeypatch):
    monkeypatch.setattr(reference, "LAYER_NORM_EPS", 1e-5)


def flipped_taps(model, monkeypatch):
    for block in model.blocks:
        block.narrow_conv.weight.data = block.narrow_conv.weight.data.flip(-1)
        block.wide_conv.weight.data = block.wide_conv.weight.data.flip(-1)


def swapped_dilation(model, monkeypatch):
    for block in model.blocks:
        block.wide_dilation = 4


def masked_pad(model, monkeypatch):
    literal = PackedBatch.from_padded

    def without_pad(tokens, lengths=None, mask=None, gap=20):
        return literal(tokens, lengths, tokens != 25, gap)

    monkeypatch.setattr(PackedBatch, "from_padded", without_pad)


def no_gelu_on_values(model, monkeypatch):
    right = reference.global_attention

    def wrong(*arguments, **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reference, "gelu", lambda x: x)
            return right(*arguments, **options)

    monkeypatch.setattr(reference, "global_attention", wrong)


@pytest.mark.parametrize(
    "wrong", [wrong_gelu, wrong_epsilon, flipped_taps, swapped_dilation, masked_pad, no_gelu_on_values]
)
def test_a_deliberately_wrong_model_fails_the_golden_forward(tiny_model, golden, monkeypatch, wrong):
    tiny_model.backend = "reference"
    check_forward(tiny_model, golden, "pad")
    wrong(tiny_model, monkeypatch)
    with pytest.raises(AssertionError, match="not close"):
        check_forward(tiny_model, golden, "pad")


def pretraining_losses(model: ProteinBert, golden: dict[str, np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = model.token_embedding.weight.dtype
    out = model(as_tensor(golden["batch_x_tokens"]), as_tensor(golden["batch_x_annotations"]).to(dtype))
    token_loss = reference.token_loss(
        out.token_logits.flatten(0, 1),
        as_tensor(golden["batch_y_tokens"]).flatten(),
        as_tensor(golden["batch_w_seq"]).flatten(),
    )
    annotation_loss = reference.annotation_loss(
        out.go_logits, as_tensor(golden["batch_y_annotations"]), as_tensor(golden["batch_w_annotations"])
    )
    return token_loss, annotation_loss


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_pretraining_losses_equal_the_original(tiny_model, golden, backend, dtype):
    tiny_model.backend = backend
    with torch.no_grad():
        token_loss, annotation_loss = pretraining_losses(tiny_model.to(dtype), golden)
    ours = [float(token_loss + annotation_loss), float(token_loss), float(annotation_loss)]
    np.testing.assert_allclose(
        ours, golden["loss_total_seq_annotations"], rtol=1e-9 if dtype == torch.float64 else 2e-7
    )


@pytest.mark.parametrize(
    ("track", "kind"),
    [
        ("global", "binary"),
        ("global", "categorical"),
        ("global", "numeric"),
        ("seq", "binary"),
        ("seq", "categorical"),
    ],
)
def test_heads_on_all_hidden_layers_equal_the_original(tiny_model, golden, track, kind):
    """The original's fine-tuning models: one dense layer on the concatenated hidden layers."""
    case = f"ft_{track}_{kind}"
    with torch.no_grad():
        out = tiny_model(as_tensor(golden["pad_tokens"]), hidden_states=True)
    states = out.original_global() if track == "global" else out.original_local()
    logits = states @ as_tensor(golden[f"{case}_kernel"]) + as_tensor(golden[f"{case}_bias"])
    truth, weight = as_tensor(golden[f"{case}_y"]), as_tensor(golden[f"{case}_sample_weight"])
    if kind == "binary":
        prediction = logits.sigmoid()
        loss = F.binary_cross_entropy_with_logits(logits, truth.view_as(logits), reduction="none")
    elif kind == "categorical":
        prediction = logits.softmax(-1)
        loss = F.cross_entropy(logits.flatten(0, -2), truth.flatten().long(), reduction="none")
    else:
        prediction = logits
        loss = (logits[:, 0] - truth) ** 2
    torch.testing.assert_close(prediction, as_tensor(golden[f"{case}_pred"]), atol=5e-6, rtol=5e-6)
    # Keras divides the weighted sum by the number of all entries.
    mean = (loss.flatten() * weight.flatten()).mean()
    np.testing.assert_allclose(float(mean), float(golden[f"{case}_loss"]), rtol=5e-6)


def test_one_block_model_trained_by_the_original(golden):
    """Four local channels are too few for the CPU kernels: the reference operations run, and the report says why."""
    model = ProteinBert.from_pretrained(GOLDEN / "nano_model_lamb_step3_proto4.pkl")
    assert model.config == replace(model.config, n_annotations=5, d_local=4, d_global=8, n_blocks=1, n_heads=2, d_key=4)
    assert model.backend_report() == "reference (d_local is 4, not a multiple of 16 up to 4096)"
    with torch.no_grad():
        out = model(as_tensor(golden["nano_tokens"]), as_tensor(golden["nano_annotations"]).float())
    torch.testing.assert_close(out.token_probabilities, as_tensor(golden["nano_lamb_output_seq"]), atol=2e-6, rtol=0)
    torch.testing.assert_close(
        out.go_probabilities, as_tensor(golden["nano_lamb_output_annotations"]), atol=2e-6, rtol=0
    )
