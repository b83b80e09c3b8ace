"""Supervised training of VIP-ANT's audio tower: AudioSet tagging and ESC-50 classification.

    python -m trainers.vipant.tagging recipes/vipant/tagging_audioset.yaml --model runs/va --output_dir runs/tagging
    python -m trainers.vipant.tagging recipes/vipant/tagging_esc50.yaml --model runs/va --fold 1 \\
        --output_dir runs/esc50-1

Several labels a clip: binary cross entropy, class-balanced sampling, mixup, mAP. One label: cross entropy, accuracy.
"""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import datasets
import torch
from transformers import EvalPrediction, Trainer
from transformers.hf_argparser import HfArg

from modeling_vipant import VipAntForAudioClassification, VipAntProcessor
from trainers.metrics.classification import classification_metrics
from trainers.processes import leave_group
from trainers.recipes import load_rows, parse_recipe
from trainers.stage import StageArguments
from trainers.vipant.dataset import ClipDataset
from trainers.vipant.lars import lars_optimizer


@dataclass
class TaggingConfig(StageArguments):
    """Settings of tagging and classification. The data set has `audio` and `labels`."""

    # Model and data
    model: str = HfArg(default="", help="Folder or Hub id of a VIP-ANT model.")
    fold: int | None = HfArg(
        default=None, help="Value of the column fold to evaluate on, the others to train on; in place of eval_split."
    )
    num_frames: int = HfArg(default=1000, help="Spectrogram frames; 1000 is 10 s.")

    # Objective and augmentation
    multi_label: bool = HfArg(default=True, help="Whether clips have several labels.")
    balanced: bool = HfArg(default=True, help="Draw rare labels more often, by inverse frequency.")
    mixup: float = HfArg(default=0.5, help="Share of training examples that are mixed from two clips.")
    frequency_mask: int = HfArg(default=32, help="Widest masked band in mel bins (SpecAugment); 0 for none.")
    time_mask: int = HfArg(default=200, help="Longest masked stretch in frames (SpecAugment); 0 for none.")

    # Optimisation
    learning_rate: float = 5e-5
    lars: bool = HfArg(default=False, help="Use LARS in place of optim.")
    lars_weight_lr: float = HfArg(default=0.2, help="LARS' rate of weight matrices per 256 clips of the global batch.")
    lars_bias_lr: float = HfArg(
        default=0.0048, help="LARS' rate of biases, norms and scales per 256 clips of the global batch."
    )
    remove_unused_columns: bool = False

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.mixup <= 1:
            raise ValueError(f"mixup={self.mixup} is a share: choose it in [0, 1]")
        if self.fold is not None and self.eval_split:
            raise ValueError("fold and eval_split both say what to evaluate on: choose one")


def label_list(labels) -> list[str]:
    """A row's `labels` as a list of names: a name, a number, or a list of them."""
    return [str(label) for label in (labels if isinstance(labels, (list, tuple)) else [labels])]


class LabelEncoder:
    """Rows' `labels` as tensors.

    Args:
        names: All labels, in the order of the model's outputs.
        multi_label: Whether to give `[labels]` of 0 and 1, else the label's number.
    """

    def __init__(self, names: Sequence[str], multi_label: bool):
        self.ids = {name: i for i, name in enumerate(names)}
        self.multi_label = multi_label

    def __call__(self, labels) -> torch.Tensor:
        """Raises LookupError for an unknown label, or several where there must be one."""
        shares = self.shares(labels)
        return shares if self.multi_label else shares.argmax()

    def shares(self, labels) -> torch.Tensor:
        """`[labels]` of 0 and 1, also where a clip has one label: what mixup mixes."""
        found = label_list(labels)
        if unknown := [name for name in found if name not in self.ids]:
            raise LookupError(f"unknown labels: {', '.join(unknown)}")
        if not self.multi_label and len(found) != 1:
            raise LookupError(f"{len(found)} labels where one is needed (multi_label is false)")
        shares = torch.zeros(len(self.ids))
        shares[[self.ids[name] for name in found]] = 1.0
        return shares


class TaggingDataset(ClipDataset):
    """`ClipDataset` whose training examples are, with probability `mixup`, mixed from two clips.

    Waveforms, each without its mean, and label vectors are mixed with a weight from Beta(10, 10), as in VIP-ANT.

    Args:
        rows: With `audio` and `labels`.
        processor: The model's processor.
        encoder: Of the labels.
        training: Whether to augment.
        mixup: Share of mixed examples.
        **kwargs: Further arguments of `ClipDataset`.
    """

    def __init__(self, rows, processor, encoder: LabelEncoder, training: bool, mixup: float = 0.0, **kwargs):
        super().__init__(rows, processor, ["audio"], training, **kwargs)
        self.encoder = encoder
        self.mixup = mixup if training else 0.0

    def example(self, row: dict) -> dict[str, torch.Tensor]:
        """`input_features` and `labels`; with mixup the labels of every training example are shares `[labels]`."""
        waveform = self.waveform(row)
        labels = self.encoder.shares(row["labels"]) if self.mixup else self.encoder(row["labels"])
        if torch.rand(()) < self.mixup:
            other = self.rows[int(torch.randint(len(self), ()))]
            share = float(torch.distributions.Beta(10.0, 10.0).sample())
            waveform = mix(waveform, self.waveform(other), share)
            labels = share * labels + (1 - share) * self.encoder.shares(other["labels"])
        return {"input_features": self.features(waveform), "labels": labels}


def mix(one: torch.Tensor, other: torch.Tensor, share: float) -> torch.Tensor:
    """`share` of one waveform and the rest of another, which is cut or padded to the first's length."""
    other = other[: len(one)] - other[: len(one)].mean()
    other = torch.nn.functional.pad(other, (0, len(one) - len(other)))
    return share * (one - one.mean()) + (1 - share) * other


def balanced_weights(rows: datasets.Dataset) -> torch.Tensor:
    """Sampling weight of each clip: the sum over its labels of their inverse frequencies, `[clips]`."""
    labels = [label_list(row) for row in rows["labels"]]
    counts = Counter(name for row in labels for name in row)
    return torch.tensor([sum(1.0 / counts[name] for name in row) for row in labels], dtype=torch.double)


class BalancedSampler(torch.utils.data.Sampler):
    """Draws clips with replacement in proportion to weights; the order follows from seed and epoch alone."""

    def __init__(self, weights: torch.Tensor, seed: int):
        self.weights, self.seed, self.epoch = weights, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch's draw."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.weights)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        yield from torch.multinomial(self.weights, len(self), replacement=True, generator=generator).tolist()


class TaggingTrainer(Trainer):
    """`Trainer` with class-balanced sampling and LARS.

    Args:
        args: A `TaggingConfig`.
        **kwargs: As of `transformers.Trainer`.
    """

    optimizer: torch.optim.Optimizer | None

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """LARS with rates scaled to the global batch, or what `optim` says."""
        if self.optimizer is None and self.args.lars:
            self.optimizer = lars_optimizer(model or self.model, self.args, self.accelerator.num_processes)
        return super().create_optimizer(model)

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not self.args.balanced:
            return super()._get_train_sampler(dataset)
        return BalancedSampler(balanced_weights(dataset.rows), self.args.seed)


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """mAP, and accuracy where clips have one label."""
    scores, labels = torch.from_numpy(prediction.predictions), torch.from_numpy(prediction.label_ids)
    targets = labels > 0.5 if labels.ndim == 2 else labels
    metrics = classification_metrics(scores, targets)
    return {name: float(metrics[name]) for name in ("map", "accuracy") if name in metrics}


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains as the recipe says, evaluates, and saves model and processor to `output_dir`."""
    config = parse_recipe(TaggingConfig, sys.argv[1:] if arguments is None else arguments)
    train_rows, eval_rows = load_rows(config.dataset, config.train_split), None
    if config.fold is not None:
        rows = train_rows
        train_rows = rows.filter(lambda fold: fold != config.fold, input_columns="fold")
        eval_rows = rows.filter(lambda fold: fold == config.fold, input_columns="fold")
        if len(eval_rows) == 0 or len(train_rows) == 0:
            raise ValueError(f"fold {config.fold} does not part the data: folds are {sorted(set(rows['fold']))}")
    elif config.eval_split:
        eval_rows = load_rows(config.dataset, config.eval_split)
    labelled = [train_rows] if eval_rows is None else [train_rows, eval_rows]
    names = sorted({name for rows in labelled for row in rows["labels"] for name in label_list(row)})
    kind = "multi_label_classification" if config.multi_label else "single_label_classification"
    model = VipAntForAudioClassification.from_pretrained(
        config.model,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
        problem_type=kind,
    )
    processor = VipAntProcessor.from_pretrained(config.model)
    processor.feature_extractor.num_frames = config.num_frames
    encoder = LabelEncoder(names, config.multi_label)
    train = TaggingDataset(
        train_rows,
        processor,
        encoder,
        training=True,
        mixup=config.mixup,
        frequency_mask=config.frequency_mask,
        time_mask=config.time_mask,
        max_skipped=config.max_skipped,
    )
    evaluation = None
    if eval_rows is not None:
        evaluation = TaggingDataset(eval_rows, processor, encoder, training=False, max_skipped=0.0)
    trainer = TaggingTrainer(
        model,
        config,
        train_dataset=train,
        eval_dataset=evaluation,
        data_collator=train.collate,
        processing_class=processor,
        compute_metrics=compute_metrics,
    )
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    if evaluation is not None:
        trainer.save_metrics("eval", trainer.evaluate())


if __name__ == "__main__":
    main()
    leave_group()
