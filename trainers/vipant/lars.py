"""LARS: layer-wise adaptive rate scaling, for very large batches."""

import torch
from torch import nn


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step per weight matrix is proportional to the matrix' own norm.

    For a weight w with gradient g: u = g + decay * w; u *= eta * |w| / |u|; m = momentum * m + u; w -= lr * m.
    One-dimensional parameters (biases, norms, scales) take plain momentum steps without decay, as in the recipe that
    VIP-ANT and Barlow Twins share.

    Args:
        params: Parameters or groups, see `lars_groups`.
        lr: Learning rate.
        momentum: Factor of the running sum of updates.
        weight_decay: L2 decay of weight matrices.
        eta: Trust coefficient.

    Source: You et al., arXiv 1708.03888, algorithm 1; VIP-ANT's and Barlow Twins' settings.
    """

    def __init__(self, params, lr: float = 0.2, momentum: float = 0.9, weight_decay: float = 1e-6, eta: float = 1e-3):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eta": eta})

    @torch.no_grad()
    def step(self, closure=None):
        """Takes one step; `closure` as in `torch.optim.Optimizer`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                update = weight.grad
                if weight.ndim > 1:
                    update = update.add(weight, alpha=group["weight_decay"])
                    weight_norm, update_norm = weight.norm(), update.norm()
                    trust = group["eta"] * weight_norm / update_norm
                    update = update * torch.where((weight_norm > 0) & (update_norm > 0), trust, torch.ones_like(trust))
                state = self.state[weight]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                buffer = state["momentum_buffer"].mul_(group["momentum"]).add_(update)
                weight.sub_(buffer, alpha=group["lr"])
        return loss


def lars_groups(model: nn.Module, weight_lr: float, bias_lr: float) -> list[dict]:
    """Parameter groups for `LARS`: weight matrices at one rate, everything one-dimensional at another.

    Args:
        model: Only its parameters with `requires_grad` are taken.
        weight_lr: Learning rate of tensors with two or more dimensions.
        bias_lr: Learning rate of the others.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trained if parameter.ndim > 1], "lr": weight_lr},
        {"params": [parameter for parameter in trained if parameter.ndim <= 1], "lr": bias_lr},
    ]


def lars_optimizer(model: nn.Module, args, processes: int) -> LARS:
    """LARS with rates in proportion to the global batch.

    Args:
        model: What trains.
        args: Training arguments with `lars_weight_lr` and `lars_bias_lr`, rates per 256 clips.
        processes: Their number.
    """
    scale = args.train_batch_size * args.gradient_accumulation_steps * processes / 256
    groups = lars_groups(model, args.lars_weight_lr * scale, args.lars_bias_lr * scale)
    return LARS(groups, weight_decay=args.weight_decay)
