"""Token sets for the tests of the losses, and the losses by name."""

import torch

from trainers.losses import attentive_transport, mmd, optimal_transport

TOKEN_LOSSES = {
    "mmd": mmd,
    "exact": optimal_transport,
    "sinkhorn": lambda a, i, **kw: optimal_transport(a, i, solver="sinkhorn", **kw),
    "unbalanced": lambda a, i, **kw: optimal_transport(a, i, solver="unbalanced", **kw),
    "attentive": lambda a, i, **kw: attentive_transport(a, i, None, None, 10.0, **kw),
}


def make_tokens(batch=3, n=7, m=9, d=5, dtype=torch.float32, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    audio = scale * torch.randn(batch, n, d, generator=generator, dtype=torch.float64)
    image = scale * (0.8 * torch.randn(batch, m, d, generator=generator, dtype=torch.float64) + 0.5)
    return audio.to(dtype), image.to(dtype)


def make_weights(batch, n, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(torch.randn(batch, n, generator=generator, dtype=torch.float64), 1).to(dtype)


def value_and_grads(loss, audio, image, **options):
    audio, image = audio.detach().requires_grad_(), image.detach().requires_grad_()
    value = loss(audio, image, **options)
    factors = torch.arange(1, len(value) + 1, dtype=value.dtype)  # a gradient of another pair's would show
    return value.detach(), *torch.autograd.grad((value * factors).sum(), (audio, image))


def relative(x, reference):
    return ((x.double() - reference.double()).norm() / reference.double().norm()).item()
