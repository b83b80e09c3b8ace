"""InfoNCE against its formula, and two processes against one."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from tests.trainers.losses.common import relative
from trainers.losses import contrastive, mean_tokens
from trainers.processes import run_in_processes


def embeds(batch=6, d=5):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, d, generator=generator), torch.randn(batch, d, generator=generator)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_formula(reduction):
    audio, other = embeds()
    cosine = torch.cosine_similarity(audio[:, None].double(), other[None].double(), dim=2) / 0.05
    expected = -torch.log_softmax(cosine, 1).diagonal() - torch.log_softmax(cosine, 0).diagonal()
    if reduction == "mean":
        expected = expected / 2
    value = contrastive(audio, other, 20.0, reduction)
    assert relative(value, expected) < 1e-5


def test_learnable_scale_and_confidence():
    audio, other = embeds()
    log_scale = torch.tensor(math.log(1 / 0.07), requires_grad=True)
    confidence = torch.arange(6.0)
    loss = contrastive(audio, other, log_scale.exp(), "sum", pair_confidence=confidence)
    torch.testing.assert_close(loss, confidence * contrastive(audio, other, 1 / 0.07, "sum"))
    (grad,) = torch.autograd.grad(loss.sum(), log_scale)
    with torch.no_grad():
        up, down = (
            contrastive(audio.double(), other.double(), (log_scale.double() + step).exp(), "sum", confidence).sum()
            for step in (1e-5, -1e-5)
        )
    torch.testing.assert_close(grad.double(), (up - down) / 2e-5, rtol=1e-4, atol=0)


def test_low_precision_inside_autocast():
    audio, other = embeds(32, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = contrastive(audio.bfloat16(), other.bfloat16(), 20.0)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, contrastive(audio.bfloat16().float(), other.bfloat16().float(), 20.0))


def test_mean_tokens():
    tokens = torch.randn(2, 5, 3)
    torch.testing.assert_close(mean_tokens(tokens), tokens.mean(1))
    mask = torch.tensor([[True, True, False, False, False], [True] * 5])
    tokens[0, 2:] = float("nan")
    torch.testing.assert_close(mean_tokens(tokens, mask)[0], tokens[0, :2].mean(0))
    assert mean_tokens(tokens.bfloat16(), mask).dtype == torch.float32


def test_errors():
    audio, other = embeds()
    with pytest.raises(ValueError, match="choose 'mean' or 'sum'"):
        contrastive(audio, other, 1.0, "both")
    with pytest.raises(ValueError, match=r"must both be \[batch, width\]"):
        contrastive(audio, other[:5], 1.0)
    other[4, 0] = float("nan")
    with pytest.raises(ValueError, match="other_embeds of pair 4 hold NaN"):
        contrastive(audio, other, 1.0)


def make_model():
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"audio": torch.nn.Linear(5, 4), "other": torch.nn.Linear(5, 4)})
    model.register_parameter("log_scale", torch.nn.Parameter(torch.tensor(2.0)))
    return model


class Loss(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, audio, other, confidence):
        model = self.model
        embeddings = model["audio"](audio), model["other"](other)
        return contrastive(*embeddings, model.log_scale.exp(), "sum", pair_confidence=confidence)


def one_of_two(results, report):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    loss = Loss(make_model())
    audio, other = embeds()
    confidence = torch.arange(1.0, 7.0)
    mine = slice(3 * rank, 3 * rank + 3)
    wrapped = torch.nn.parallel.DistributedDataParallel(loss)
    value = wrapped(audio[mine], other[mine], confidence[mine])
    value.mean().backward()
    message = ""
    try:
        contrastive(audio[: 2 + rank], other[: 2 + rank], 1.0)
    except ValueError as error:
        message = str(error)
    grads = [p.grad.clone() for p in loss.parameters()]
    torch.save({"value": value.detach(), "grads": grads, "message": message}, f"{results}/{rank}.pt")


def test_two_processes_have_the_gradients_of_one(tmp_path):
    run_in_processes(one_of_two, (tmp_path,), 2, print)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    loss = Loss(make_model())
    audio, other = embeds()
    value = loss(audio, other, torch.arange(1.0, 7.0))
    value.mean().backward()
    torch.testing.assert_close(torch.cat([result["value"] for result in results]), value.detach())
    for result in results:
        for grad, parameter in zip(result["grads"], loss.parameters(), strict=True):
            assert relative(grad, parameter.grad) < 1e-5
        assert "batches of [2, 3] pairs" in result["message"]
    # and it is not what the halves would give on their own
    halves = [F.normalize(x, dim=1) for x in (audio[:3], other[:3])]
    assert not torch.allclose(contrastive(*halves, 2.0), contrastive(audio, other, 2.0)[:3])
