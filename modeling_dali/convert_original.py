"""
Converts the authors' released files to a DALI folder that transformers loads.

    python -m modeling_dali.convert_original --llava DIR_OR_ID --audio-backbone audio_backbone.pth \
        [--projector prefixMLP.bin] [--prefix prefix.bin] --output DIR

A public CAV-MAE checkpoint (without `proj`) serves as audio backbone too: it is the start of stage 1b. Scorers of
attentive transport in the backbone are written beside the model, where `dali explain` uses them.
"""

import argparse
import sys
from collections import Counter

from transformers import AutoImageProcessor, AutoTokenizer

from datasets_scripts.commands import run_command

from .checkpoint_dali import read_prefix, read_projector
from .explain import save_scorers
from .feature_extraction_kaldi_fbank import KaldiFbankFeatureExtractor
from .modeling_dali import DaliForConditionalGeneration
from .processing_dali import DaliProcessor


def convert(llava, audio_backbone, output, projector=None, prefix=None) -> None:
    """
    Writes a DALI folder: model, processor, code and card, and the scorers of attentive transport if there are any.

    Args:
        llava: LLaVA checkpoint, folder or Hub id.
        audio_backbone, projector, prefix: The released files.
        output: Folder to write.

    Raises:
        ValueError: if a file lacks a tensor, or one has another shape.
    """
    tokenizer = load_tokenizer(llava)
    model = DaliForConditionalGeneration.from_llava(llava, tokenizer=tokenizer)
    backbone = model.load_audio_encoder(audio_backbone)
    report(audio_backbone, backbone.unneeded)
    if projector is not None:
        state, unneeded = read_projector(projector, model.model.audio_projector)
        model.model.audio_projector.load_state_dict(state)
        report(projector, unneeded)
    if prefix is not None:
        soft_tokens, unneeded = read_prefix(prefix, model.config.text_config.hidden_size)
        model.set_prefix(soft_tokens)
        report(prefix, unneeded)
    # The published weights were tuned in LLaVA's v1 conversation, whatever template the captioner brings.
    processor = DaliProcessor.for_model(
        model.config, AutoImageProcessor.from_pretrained(llava), tokenizer, KaldiFbankFeatureExtractor()
    )
    model.save_pretrained(output)
    processor.save_pretrained(output)
    if backbone.scorers:
        save_scorers(output, backbone.scorers)


def load_tokenizer(llava):
    """
    LLaVA's tokenizer as the authors use it: they tokenise the text behind media by itself, so that it begins with a
    space of its own. That is what transformers' `LlamaTokenizer` calls `legacy`.
    """
    tokenizer = AutoTokenizer.from_pretrained(llava, legacy=True)
    tokenizer.init_kwargs["legacy"] = True  # or a saved tokenizer would forget it
    return tokenizer


def report(path, unneeded: Counter) -> None:
    """Names what a file held beyond what was needed."""
    groups = ", ".join(f"{name} ({count})" for name, count in sorted(unneeded.items()))
    print(f"{path}: not needed: {groups or 'nothing'}.", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m modeling_dali.convert_original", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--llava", required=True, help="LLaVA checkpoint in transformers' format: folder or Hub id")
    parser.add_argument("--audio-backbone", required=True, help="audio_backbone.pth, or a CAV-MAE checkpoint")
    parser.add_argument("--projector", help="prefixMLP.bin or audio_projector.bin: the audio projector")
    parser.add_argument("--prefix", help="prefix.bin: the soft prefix")
    parser.add_argument("--output", required=True, help="folder to write")
    return run_command(parser, _convert, arguments)


def _convert(options: argparse.Namespace) -> int:
    convert(options.llava, options.audio_backbone, options.output, options.projector, options.prefix)
    return 0


if __name__ == "__main__":
    sys.exit(main())
