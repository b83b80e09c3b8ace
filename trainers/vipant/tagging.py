"""Supervised training of VIP-ANT's audio tower: AudioSet tagging and ESC-50 classification.

    python -m trainers.vipant.tagging vipant/tagging_audioset --model runs/va --dataset DATA --output_dir runs/tagging
    python -m trainers.vipant.tagging vipant/tagging_esc50 --model runs/va --dataset DATA --fold 1 --output_dir runs/1

Several labels a clip: binary cross entropy, class-balanced sampling, mixup, mAP. One label: cross entropy, accuracy.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import datasets
import torch
import torch.nn.functional as F
from transformers import EvalPrediction
from transformers.hf_argparser import HfArg

from modeling_vipant import VipAntForAudioClassification, VipAntProcessor
from trainers.metrics.classification import classification_metrics
from trainers.recipes import load_splits
from trainers.rows import sample_rng, without_decoding
from trainers.stage import StageArguments, StageTrainer, run_stage
from trainers.vipant.data_collator import ClipCollator, seeded
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


class TaggingCollator(ClipCollator):
    """
    Batches of sounds with labels; training examples are, with probability `mixup`, mixed from two clips.

    Waveforms, each without its mean, and label vectors are mixed with a weight from Beta(10, 10), as in VIP-ANT.

    Args:
        processor (`VipAntProcessor`): The model's.
        encoder (`LabelEncoder`): Encodes the labels.
        mixup (`float`, *optional*, defaults to 0.0): Share of mixed examples.
        rows (*optional*): The training rows, of which the second clip is one.
        kwargs: Further arguments of [`ClipCollator`].
    """

    def __init__(self, processor, encoder: LabelEncoder, mixup: float = 0.0, rows=None, **kwargs):
        super().__init__(processor, ["audio"], **kwargs)
        self.encoder = encoder
        self.mixup = mixup
        self.rows = without_decoding(rows)

    @property
    def columns(self) -> list[tuple[str, ...]]:
        """The columns it reads, for [`require_columns`]."""
        return [("audio",), ("labels",)]

    def read(self, row: dict) -> dict[str, torch.Tensor]:
        """`input_features` and `labels`; with mixup the labels of every training example are shares `[labels]`."""
        rng = sample_rng(self.seed, row)
        mixup = 0.0 if rng is None else self.mixup
        with seeded(rng):
            waveform = self.waveform(row)
            labels = self.encoder.shares(row["labels"]) if mixup else self.encoder(row["labels"])
            if torch.rand(()) < mixup:
                other = self.rows[int(torch.randint(len(self.rows), ()))]
                share = float(torch.distributions.Beta(10.0, 10.0).sample())
                waveform = mix(waveform, self.waveform(other), share)
                labels = share * labels + (1 - share) * self.encoder.shares(other["labels"])
            features = self.features(waveform, training=rng is not None)
            return {"input_features": self.masked(features, training=rng is not None), "labels": labels}

    def blank(self, row: dict) -> dict[str, torch.Tensor]:
        """What stands in for a row that cannot be decoded."""
        shares = torch.zeros(len(self.encoder.ids))
        mixed = self.mixup > 0 and "epoch" in row
        return super().blank(row) | {"labels": shares if self.encoder.multi_label or mixed else shares.argmax()}


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


class TaggingTrainer(StageTrainer):
    """
    Trains a classifier of sounds.

    Args:
        model (`VipAntForAudioClassification`): The model; all of it trains.
        args (`TaggingConfig`): Settings.
        processor (`VipAntProcessor`): The model's.
        train_dataset, eval_dataset: Rows with `audio` and `labels`.
        kwargs: Further arguments of `Trainer`.
    """

    optimizer: torch.optim.Optimizer | None

    def __init__(
        self,
        model: VipAntForAudioClassification,
        args: TaggingConfig,
        processor: VipAntProcessor,
        train_dataset=None,
        eval_dataset=None,
        **kwargs,
    ):
        collator = TaggingCollator(
            processor,
            LabelEncoder([model.config.id2label[i] for i in range(model.config.num_labels)], args.multi_label),
            args.mixup,
            train_dataset,
            frequency_mask=args.frequency_mask,
            time_mask=args.time_mask,
            max_skipped=args.max_skipped,
            seed=args.seed,
        )
        trained = [name for name, _ in model.named_children()]
        super().__init__(
            model,
            args,
            trained,
            processor,
            train_dataset,
            eval_dataset,
            collator,
            compute_metrics=compute_metrics,
            **kwargs,
        )
        self.label_names = ["labels", "pair_weight"]
        self.model_accepts_loss_kwargs = False

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """LARS with rates scaled to the global batch, or what `optim` says."""
        if self.optimizer is None and self.args.lars:
            self.optimizer = lars_optimizer(model or self.model, self.args, self.accelerator.num_processes)
        return super().create_optimizer(model)

    def row_weights(self) -> torch.Tensor | None:
        """With `balanced`, rare labels are drawn more often."""
        return balanced_weights(self.train_dataset.rows) if self.args.balanced else None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean loss over the clips of the batch that count."""
        if self.model.training:
            self.freeze()
        labels, weight = inputs["labels"], inputs["pair_weight"]
        logits = model(input_features=inputs["input_features"]).logits.float()
        if self.args.multi_label:
            losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1)
        else:
            losses = F.cross_entropy(logits, labels, reduction="none")
        loss = (losses * weight).sum() / weight.sum().clamp(min=1)
        return (loss, {"logits": logits}) if return_outputs else loss


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """mAP, and accuracy where clips have one label."""
    scores, labels, weight = map(torch.from_numpy, (prediction.predictions, *prediction.label_ids))
    scores, labels = scores[weight > 0], labels[weight > 0]
    targets = labels > 0.5 if labels.ndim == 2 else labels
    metrics = classification_metrics(scores, targets)
    return {name: float(metrics[name]) for name in ("map", "accuracy") if name in metrics}


def new_trainer(config: TaggingConfig) -> TaggingTrainer:
    """The trainer, with model and data, that the settings describe."""
    train_rows, eval_rows = load_splits(config)
    if config.fold is not None:
        rows = train_rows
        train_rows = rows.filter(lambda fold: fold != config.fold, input_columns="fold")
        eval_rows = rows.filter(lambda fold: fold == config.fold, input_columns="fold")
        if len(eval_rows) == 0 or len(train_rows) == 0:
            raise ValueError(f"fold {config.fold} does not part the data: folds are {sorted(set(rows['fold']))}")
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
    return TaggingTrainer(model, config, processor, train_rows, eval_rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains as the recipe says."""
    return run_stage(TaggingConfig, new_trainer, arguments)


if __name__ == "__main__":
    sys.exit(main())
