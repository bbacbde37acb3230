"""Inputs of the two losses and the right answers in float64, for tests of every implementation."""

import torch
from torch import Tensor, nn

from proteinbert_fast.ops import reference


class LossCase:
    """A head with states, targets and weights in a dtype; some weights are 0, their targets mean nothing."""

    def __init__(self, loss: str, rows: int, inputs: int, outputs: int, dtype: torch.dtype, device, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.loss = loss
        self.layer = nn.Linear(inputs, outputs)
        with torch.no_grad():
            self.layer.weight.copy_(random(outputs, inputs) * 2 / inputs**0.5)
            # GO logits of a trained model are far below 0 nearly everywhere.
            self.layer.bias.copy_(random(outputs) - (6 if loss == "annotation" else 0))
        self.layer = self.layer.to(device, dtype)
        self.states = random(rows, inputs).to(device, dtype)
        self.weights = (torch.rand(rows, generator=generator) * 2).where(random(rows) > -0.5, 0).to(device)
        if loss == "token":
            targets = torch.randint(0, outputs, (rows,), generator=generator).to(device)
            self.rest = (targets.where(self.weights != 0, outputs), self.weights)
        else:
            targets = torch.rand(rows, outputs, generator=generator) < 0.05
            self.rest = (targets.to(device), self.weights, torch.rand(outputs, generator=generator).to(device))

    def right(self, scale: float = 1.0) -> list[Tensor]:
        """Loss and gradients of states, weight and bias."""
        exact = [t.detach().double().requires_grad_() for t in (self.states, self.layer.weight, self.layer.bias)]
        function = reference.token_loss_sum if self.loss == "token" else reference.annotation_loss_sum
        rest = [t.double() if t.is_floating_point() else t for t in self.rest]
        loss = function(*exact, *rest) * scale
        return [loss.detach(), *torch.autograd.grad(loss, exact)]

    def ours(self, function, scale: float = 1.0) -> list[Tensor]:
        """The same of an operation that takes a layer."""
        states = self.states.detach().requires_grad_()
        loss = function(self.layer, states, *self.rest) * scale
        return [loss.detach(), *torch.autograd.grad(loss, [states, self.layer.weight, self.layer.bias])]


def check(ours: list[Tensor], right: list[Tensor], tolerance: float) -> None:
    """Relative to the largest number of each tensor."""
    for name, a, b in zip(("loss", "states", "weight", "bias"), ours, right, strict=True):
        assert a.shape == b.shape
        size = float(b.abs().max()) if b.numel() else 1.0
        difference = float((a.double() - b).abs().max()) if b.numel() else 0.0
        assert difference <= tolerance * max(size, 1e-30), f"{name} is off by {difference / size:.2e} of its largest"
