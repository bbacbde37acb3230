"""torch.export: one program for batches of all sizes, of the layout's tensors alone."""

import warnings

import pytest
import torch
from torch import Tensor, nn

from proteinbert_fast import PackedBatch, ProteinBert, Tokenizer


class States(nn.Module):
    """What is exported: tensors in, tensors out."""

    def __init__(self, model: ProteinBert) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch = PackedBatch.on_device(tokens, starts, lengths, gap=20, longest=tokens.shape[0])
        out = self.model(batch)
        return out.local_rows, out.global_state, out.go_probabilities


def check(model: ProteinBert, device: torch.device, path) -> list[str]:
    """Exports, saves and loads; compares with the model on batches of other sizes. Gives the operators' names."""

    def arguments(sequences):
        batch = Tokenizer()(sequences).to(device)
        return batch.tokens, batch.starts, batch.lengths

    rows, proteins = torch.export.Dim("rows", min=64), torch.export.Dim("proteins", min=1)
    dynamic = ({0: rows}, {0: proteins}, {0: proteins})
    with torch.no_grad():
        program = torch.export.export(States(model), arguments(["MKTAYIAKQR", "M"]), dynamic_shapes=dynamic)
        torch.export.save(program, path)
        with warnings.catch_warnings():
            # PyTorch 2.11 reads what it saved from a buffer that it then warns of itself.
            warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
            loaded = torch.export.load(path).module()
        for sequences in (["MKTAYIAKQR", "M"], ["A" * 300, "MK", "", "WW"], ["ACDEF" * 20]):
            out = model(Tokenizer()(sequences).to(device))
            local, state, probabilities = loaded(*arguments(sequences))
            torch.testing.assert_close(local, out.local_rows, atol=2e-5, rtol=2e-5)
            torch.testing.assert_close(state, out.global_state, atol=2e-5, rtol=2e-5)
            torch.testing.assert_close(probabilities, out.go_probabilities, atol=2e-5, rtol=2e-5)
    return [str(node.target) for node in program.graph.nodes]


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_export_with_dynamic_sizes(small_model, tmp_path, backend):
    small_model.backend = backend
    check(small_model, torch.device("cpu"), tmp_path / "program.pt2")
