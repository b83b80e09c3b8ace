"""Run by `test_contrastive.py` in two processes: writes loss and gradients of one step."""

from pathlib import Path

import torch

from tests.tiny_vipant import NUM_BINS, NUM_FRAMES, tiny_processor, tiny_vipant
from trainers.vipant.contrastive import ContrastiveConfig, ContrastiveTrainer

SETTINGS = {
    "va": {"pairs": ["audio-image"]},
    "va-cached": {"pairs": ["audio-image"], "micro_batch_size": 2},
    "at-cached": {"pairs": ["audio-text"], "micro_batch_size": 3},
    "all-cached": {
        "pairs": ["audio-image", "audio-text", "image-text"],
        "train_towers": ["audio", "image", "text"],
        "micro_batch_size": 3,
    },
    "barlow": {"loss": "barlow_twins", "micro_batch_size": 2, "barlow_projector": [12, 20, 20]},
}


def model64():
    """In double precision: the bounds are then about the method, not about the order of float32 sums."""
    return tiny_vipant().double()


def batch(size: int = 8) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    input_ids = torch.randint(0, 500, (size, 6), generator=generator)
    input_ids[:, -1] = 513
    return {
        "input_features": torch.randn(size, NUM_FRAMES, NUM_BINS, generator=generator).double(),
        "pixel_values": torch.randn(size, 3, 28, 28, generator=generator).double(),
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
    }


def step(folder: Path, dropout: float = 0.0, **settings) -> dict:
    """Loss and gradients of one training step on this process's share of the batch."""
    model = model64()
    for module in model.modules():
        if hasattr(module, "scale") and hasattr(module, "dropout"):
            module.dropout = dropout
    args = ContrastiveConfig(output_dir=str(folder), use_cpu=True, report_to=[], **settings)
    trainer = ContrastiveTrainer(model, args, tiny_processor())
    trainer.current_gradient_accumulation_steps = 1
    wrapped = trainer.accelerator.prepare(model)
    processes, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
    share = {name: tensor.chunk(processes)[rank] for name, tensor in batch().items()}
    torch.manual_seed(3)
    loss = trainer.accelerator.gather(trainer.training_step(wrapped, share)[None]).mean()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"loss": loss, "grads": grads, "processes": processes}


def steps(folder: Path, report) -> None:
    """Writes one step with each of the settings; see [`~trainers.processes.run_in_processes`]."""
    results = {name: step(folder, **settings) for name, settings in SETTINGS.items()}
    if torch.distributed.get_rank() == 0:
        torch.save(results, folder / "results.pt")
