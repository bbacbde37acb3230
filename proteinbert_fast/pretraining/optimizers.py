"""LAMB and Adam as the original trains with, and moments carried over from and to its checkpoints.

Both keep running means of each gradient and of its square, at least float32:

    m = beta1 * m + (1 - beta1) * g        v = beta2 * v + (1 - beta2) * g^2

They are not those of other libraries: PyTorch's Adam adds epsilon after the bias correction and Keras's before it, and
the usual LAMBs leave out the bias correction, clip, or spare biases and norms.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from proteinbert_fast.checkpoints import OptimizerState
from proteinbert_fast.errors import InputError, NonFiniteError


class _Moments(Optimizer):
    """An optimiser with two moments, stepped over all tensors of one device, dtype and age together."""

    def __init__(self, params: ParamsT, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        for group in self.param_groups:
            _check(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters with options of their own."""
        super().add_param_group(param_group)
        _check(self.param_groups[-1])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Makes one step.

        Args:
            closure: computes the loss again, with gradients; its result is returned.

        Raises:
            InputError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alike: dict[tuple[Any, ...], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    raise InputError(f"{type(self).__name__} takes no sparse gradients: use Embedding(sparse=False)")
                state = self.state[p]
                if not state:
                    dtype = torch.promote_types(p.dtype, torch.float32)
                    state["step"] = torch.tensor(0.0, device="cpu")  # read at every step
                    state["exp_avg"] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
                    state["exp_avg_sq"] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
                state["step"] += 1
                alike.setdefault((p.device, p.dtype, p.grad.dtype, int(state["step"])), []).append(p)
            for (*_, step), params in alike.items():
                self._step_alike(params, step, group)
        return loss

    def _step_alike(self, params: list[Tensor], step: int, group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        first = [cast(Tensor, self.state[p]["exp_avg"]) for p in params]
        second = [cast(Tensor, self.state[p]["exp_avg_sq"]) for p in params]
        gradients = [cast(Tensor, p.grad).to(m.dtype) for p, m in zip(params, first, strict=True)]
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
        self._apply(params, first, second, 1 - beta1**step, 1 - beta2**step, group)

    def _apply(
        self,
        params: list[Tensor],
        first: list[Tensor],
        second: list[Tensor],
        correction1: float,
        correction2: float,
        group: dict[str, Any],
    ) -> None:
        raise NotImplementedError

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a copy of a ``state_dict``; moments of 16-bit parameters stay float32."""
        super().load_state_dict(state_dict)
        numbers = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for number, p in zip(numbers, params, strict=True):
            dtype = torch.promote_types(p.dtype, torch.float32)
            for name, value in self.state.get(p, {}).items():
                # The base class has cast moments to their parameter's dtype, and shares what it need not cast.
                source = state_dict["state"][number][name] if name != "step" and dtype != p.dtype else value
                if name == "step":
                    self.state[p][name] = source.detach().to("cpu", copy=True)
                else:
                    self.state[p][name] = source.detach().to(value.device, dtype, copy=True)


class Lamb(_Moments):
    """LAMB (You et al. 2020, arXiv:1904.00962) as in tensorflow_addons, which the original was pretrained with.

        u = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay * w
        w = w - lr * |w| / |u| * u

    The trust ratio |w| / |u| is one number for each tensor, biases and norms too; 1 where either norm is 0.

    Args:
        params: parameters, or groups of them with options of their own.
        lr: learning rate; 2e-4 in the original's pretraining.
        betas: of the running means of the gradient and of its square.
        eps: added to the corrected root.
        weight_decay: share of the weights added to each update, none in the original. It never enters the moments.

    Raises:
        InputError: an option is out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay)

    def _apply(
        self,
        params: list[Tensor],
        first: list[Tensor],
        second: list[Tensor],
        correction1: float,
        correction2: float,
        group: dict[str, Any],
    ) -> None:
        roots = torch._foreach_sqrt(second)
        torch._foreach_div_(roots, math.sqrt(correction2))
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_mul_(roots, correction1)
        updates = torch._foreach_div(first, roots)
        weights = [p.to(u.dtype) for p, u in zip(params, updates, strict=True)]
        if group["weight_decay"]:
            torch._foreach_add_(updates, weights, alpha=group["weight_decay"])
        sizes, steps = torch.stack(torch._foreach_norm(weights)), torch.stack(torch._foreach_norm(updates))
        ratios = (sizes / steps).where((sizes > 0) & (steps > 0), 1.0)
        del roots
        factors = _spread(ratios, updates) if ratios.is_cuda else ratios.unbind()
        torch._foreach_mul_(updates, factors)
        torch._foreach_add_(params, updates, alpha=-group["lr"])


_ROW = 1024  # numbers


def _spread(numbers: Tensor, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """One number for each tensor as tensors of their shapes, made in a few launches.

    On a GPU, ``_foreach`` operations take all tensors at once only where those of a pair are alike in shape; with
    numbers as they are, each tensor would have a launch of its own.
    """
    rows = tuple(-(-t.numel() // _ROW) for t in like)
    of_rows = numbers.repeat_interleave(_on_device(rows, numbers.device), output_size=sum(rows))
    parts = torch.split(of_rows[:, None].expand(-1, _ROW).contiguous(), list(rows))
    return tuple(part.view(-1)[: t.numel()].view(t.shape) for part, t in zip(parts, like, strict=True))


@lru_cache(maxsize=64)
def _on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Numbers that are the same in every step: brought to the device once, because a GPU is waited for then."""
    return torch.tensor(numbers, device=device)


class KerasAdam(_Moments):
    """Adam (Kingma and Ba 2015, arXiv:1412.6980) in Keras's form, which the original is fine-tuned with.

        w = w - lr * sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + eps)

    PyTorch's Adam divides sqrt(v) by sqrt(1 - beta2^t) before it adds epsilon: with the same epsilon its first steps
    are longer where gradients are small.

    Args:
        params: parameters, or groups of them with options of their own.
        lr: learning rate.
        betas: of the running means of the gradient and of its square.
        eps: added to the root before the bias correction.
        weight_decay: share ``lr * weight_decay`` of the weights taken off each step (Loshchilov and Hutter 2019).

    Raises:
        InputError: an option is out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-7,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay)

    def _apply(
        self,
        params: list[Tensor],
        first: list[Tensor],
        second: list[Tensor],
        correction1: float,
        correction2: float,
        group: dict[str, Any],
    ) -> None:
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        roots = torch._foreach_sqrt(second)
        torch._foreach_add_(roots, group["eps"])
        updates = torch._foreach_div(first, roots)
        torch._foreach_add_(params, updates, alpha=-group["lr"] * math.sqrt(correction2) / correction1)


def with_moments(optimizer: Optimizer, model: nn.Module, moments: OptimizerState) -> dict[str, Any]:
    """The optimiser's ``state_dict`` with the moments of a checkpoint of the original, to go on from there::

        checkpoint = read_official(path)
        optimizer = Lamb(model.parameters())
        optimizer.load_state_dict(with_moments(optimizer, model, checkpoint.optimizer_state))

    The checkpoint holds no options: learning rate and betas stay the optimiser's.

    Args:
        optimizer: a ``Lamb`` or ``KerasAdam`` over parameters of ``model``.
        model: gives the parameters their names.
        moments: as ``checkpoints.read_official`` gives them.

    Raises:
        InputError: a parameter is not one of the model's, or the moments have none or another shape for it.
    """
    state: dict[int, dict[str, Tensor]] = {}
    for number, (name, p) in enumerate(_named(optimizer, model)):
        first, second = moments.first_moments.get(name), moments.second_moments.get(name)
        if first is None or second is None:
            raise InputError(f"the checkpoint has no moments of {name}")
        if first.shape != p.shape or second.shape != p.shape:
            raise InputError(f"moments of {name} are {tuple(first.shape)}, the parameter is {tuple(p.shape)}")
        step = torch.tensor(float(moments.iteration), device="cpu")
        state[number] = {"step": step, "exp_avg": first.clone(), "exp_avg_sq": second.clone()}
    return {**optimizer.state_dict(), "state": state}


def moments_of(optimizer: Optimizer, model: nn.Module) -> OptimizerState:
    """The optimiser's moments as ``checkpoints.write_official`` takes them; zeros before the first step.

    Args:
        optimizer: a ``Lamb`` or ``KerasAdam`` over parameters of ``model``.
        model: gives the parameters their names.

    Raises:
        InputError: a parameter is not one of the model's, or parameters have made unequal numbers of steps, which the
            original's format cannot say.
    """
    first, second, steps = {}, {}, set()
    for name, p in _named(optimizer, model):
        state = optimizer.state.get(p) or {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        steps.add(int(state["step"]))
        first[name], second[name] = (state[key].detach().float().cpu() for key in ("exp_avg", "exp_avg_sq"))
    if len(steps) > 1:
        raise InputError(f"parameters have made from {min(steps)} to {max(steps)} steps; the original's format has one")
    return OptimizerState(steps.pop() if steps else 0, first, second)


class LargestGradients(NamedTuple):
    """The largest magnitude of each gradient; NaN or infinity where it holds one.

    Attributes:
        names: of the parameters.
        values: float32 (n,).
    """

    names: list[str]
    values: Tensor


def largest_gradients(model: nn.Module | Iterable[tuple[str, nn.Parameter]]) -> dict[torch.device, LargestGradients]:
    """Each gradient's largest magnitude, by device. Nothing is waited for.

    Args:
        model: a module, or its ``named_parameters()``.
    """
    named = model.named_parameters() if isinstance(model, nn.Module) else model
    found: dict[torch.device, tuple[list[str], list[Tensor]]] = {}
    for name, p in named:
        if p.grad is not None and p.grad.numel():
            names, gradients = found.setdefault(p.grad.device, ([], []))
            names.append(name)
            gradients.append(p.grad)
    return {
        device: LargestGradients(names, torch.stack([n.float() for n in torch._foreach_norm(gradients, math.inf)]))
        for device, (names, gradients) in found.items()
    }


def find_nonfinite(model: nn.Module | Iterable[tuple[str, nn.Parameter]]) -> list[str]:
    """Names of the parameters whose gradients hold NaN or infinity. A GPU is waited for once.

    Args:
        model: a module, or its ``named_parameters()``.
    """
    return [
        name
        for names, largest in largest_gradients(model).values()
        for name, is_fine in zip(names, largest.isfinite().tolist(), strict=True)
        if not is_fine
    ]


def check_gradients(model: nn.Module, action: str = "stop", nonfinite: Sequence[str] | None = None) -> bool:
    """Whether all gradients are finite, so that a step may be made. A GPU is waited for once.

    With a ``GradScaler``, whose infinities are part of its work, use its own check.

    Args:
        model: after ``backward``.
        action: where they are not, "stop" raises; "skip" takes the gradients away, so that a step changes nothing, and
            returns False.
        nonfinite: what ``find_nonfinite`` gives, where that is known; nothing is waited for then.

    Raises:
        NonFiniteError: names the parameters.
        InputError: the action is unknown.
    """
    if action not in {"skip", "stop"}:
        raise InputError(f"action {action!r} is unknown; choose skip or stop")
    bad = find_nonfinite(model) if nonfinite is None else nonfinite
    if bad and action == "stop":
        shown = ", ".join(bad[:5]) + (", ..." if len(bad) > 5 else "")
        raise NonFiniteError(f"gradients of {len(bad)} parameters hold NaN or infinity: {shown}")
    if bad:
        model.zero_grad(set_to_none=True)
    return not bad


def _named(optimizer: Optimizer, model: nn.Module) -> list[tuple[str, Tensor]]:
    names = {id(p): name for name, p in model.named_parameters()}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if any(id(p) not in names for p in params):
        raise InputError("the optimiser holds a parameter that is not one of the model's")
    return [(names[id(p)], p) for p in params]


def _check(group: dict[str, Any]) -> None:
    betas = group["betas"]
    if not (math.isfinite(group["lr"]) and group["lr"] >= 0):
        raise InputError(f"lr must be a number from 0, got {group['lr']}")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise InputError(f"betas must be two numbers from 0 to below 1, got {betas}")
    for name in ("eps", "weight_decay"):
        if not (math.isfinite(group[name]) and group[name] >= 0):
            raise InputError(f"{name} must be a number from 0, got {group[name]}")
    for p in group["params"]:
        if not p.is_floating_point():
            raise InputError(f"parameters must be real floating-point tensors, got {p.dtype}")
