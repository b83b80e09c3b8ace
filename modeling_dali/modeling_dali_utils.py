"""
What every captioner with an ear can do, whatever the captioner: be loaded and saved whole or as the ear alone, hold a
soft prefix, and write text.
"""

import copy
import dataclasses
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, get_args

import torch
from accelerate.utils import align_module_device
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.dynamic_module_utils import custom_object_save
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import cached_file, is_peft_available

from .checkpoint_dali import AudioBackbone
from .configuration_dali import EarConfig, PrefixPosition
from .ear_dali import PREFIX_STD
from .model_card_dali import model_card
from .pipeline_dali import CUSTOM_PIPELINES

if is_peft_available():
    from peft import PeftConfig, PromptTuningConfig, TaskType, load_peft_weights

AUTO_CLASSES = ("AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
EAR_FILE = "ear.safetensors"
EAR_PARTS = ("audio_tower", "audio_projection", "audio_projector", "prefix")
PROJECTORS = ("multi_modal_projector", "connector", "visual.merger")  # what captioners call theirs
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


class DaliMixin(PreTrainedModel):
    """What every captioner with an ear can do; its `ear` is the module that holds the ear."""

    ear_key: str  # before the names of the ear's weights
    # Whether the captioner is the one that `config.base_model` names, bit for bit: it was loaded from there.
    captioner_is_stock = False

    # Loading and saving ---------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *args: Any,
        config: PreTrainedConfig | None = None,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        **kwargs: Any,
    ) -> Any:
        """
        Loads a saved DALI model, and takes no weight for granted. For an ear alone (see [`save_ear`]), the captioner
        that it names is loaded too.

        All arguments are those of [`~transformers.PreTrainedModel.from_pretrained`].

        Raises:
            ValueError: if the checkpoint lacks a weight of the model, holds one that the model has no place for, or
                one of another shape (unless `ignore_mismatched_sizes`). Who asks for the loading info
                (`output_loading_info=True`) gets these lists instead. Also if an ear was made for another captioner
                than the one it names.
        """
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        ear = cls.config_class.from_pretrained(pretrained_model_name_or_path, **hub) if config is None else config
        if ear.ear_only:
            kwargs = {name: kwargs[name] for name in kwargs.keys() - {*hub, "trust_remote_code"}}
            kwargs.setdefault("revision", ear.base_model_revision)
            model = cls.from_base(ear.base_model, ear=find_ear(pretrained_model_name_or_path, **hub), **kwargs)
            return (model, {}) if output_loading_info else model
        # Mismatches are let through here, to be named below together with everything else.
        model, info = super().from_pretrained(
            pretrained_model_name_or_path,
            *args,
            config=config,
            output_loading_info=True,
            ignore_mismatched_sizes=ignore_mismatched_sizes or not output_loading_info,
            **kwargs,
        )
        if output_loading_info:
            return model, info
        require_all_weights(info, str(pretrained_model_name_or_path), ignore_mismatched_sizes)
        return model

    @classmethod
    def from_base(cls, captioner: "str | os.PathLike[str] | PreTrainedModel", **kwargs: Any) -> "DaliMixin":
        """Gives a captioner an ear."""
        raise NotImplementedError

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """
        Saves weights, configuration, generation configuration, the code that loads them (see `auto_map` in the
        configuration) and, unless the folder has one, a model card. The processor is saved by its own
        `save_pretrained`.

        All arguments are those of [`~transformers.PreTrainedModel.save_pretrained`].
        """
        self.set_auto_map()
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            save_card(self.config, Path(save_directory))

    def set_auto_map(self) -> None:
        """Tells the configuration which classes load what is saved, and which pipelines run it."""
        this = f"{type(self).__module__.rpartition('.')[2]}.{type(self).__name__}"
        self.config.auto_map = {"AutoConfig": f"configuration_dali.{type(self.config).__name__}"}
        self.config.auto_map |= dict.fromkeys(AUTO_CLASSES, this)
        self.config.custom_pipelines = copy.deepcopy(CUSTOM_PIPELINES)  # transformers writes classes into it

    def _upload_modified_files(
        self,
        working_dir: str | os.PathLike[str],
        repo_id: str,
        *args: Any,
        revision: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """The last step of `push_to_hub`: a repository without a model card gets DALI's, in the same commit."""
        api = HfApi(token=kwargs.get("token"))
        if not any(api.file_exists(repo_id, "README.md", revision=branch) for branch in {revision, None}):
            path = Path(working_dir) / "README.md"
            tags = ModelCard.load(path).data.to_dict().get("tags", [])
            model_card(self.config, repo_id, tags=tags).save(path)
        return super()._upload_modified_files(working_dir, repo_id, *args, revision=revision, **kwargs)

    # The ear alone --------------------------------------------------------------------------------------------------

    def save_ear(
        self, save_directory: str | os.PathLike[str], state_dict: dict[str, torch.Tensor] | None = None
    ) -> None:
        """
        Saves all but the captioner: the ear's weights, configurations, the code that loads them and, unless the
        folder has one, a card. `from_pretrained` loads the captioner from where it came from.

        Args:
            save_directory (`str` or `os.PathLike[str]`): Folder to write.
            state_dict (`dict[str, torch.Tensor]`, *optional*): State of the whole model, where its own parameters are
                sharded.

        Raises:
            ValueError: if the captioner has no name to load it by.
        """
        if not self.config.base_model:
            raise ValueError(
                "The captioner has no name to load it by: build the model from a folder or Hub id, or set "
                "`config.base_model` to one that holds just this captioner."
            )
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.set_auto_map()
        config = copy.deepcopy(self.config)
        config.ear_only, config.architectures = True, [type(self).__name__]
        config.base_model_fingerprint = config.base_model_fingerprint or self.fingerprint()
        if self._auto_class is not None:
            custom_object_save(self, folder, config=config)
        config.save_pretrained(folder)
        self.generation_config.save_pretrained(folder)
        state = self.state_dict() if state_dict is None else state_dict
        state = {name.removeprefix(self.ear_key): t for name, t in state.items() if name.startswith(self.ear_key)}
        state = {name: t.cpu().contiguous() for name, t in state.items() if name.split(".")[0] in EAR_PARTS}
        save_file(state, folder / EAR_FILE, metadata={"format": "pt"})
        save_card(config, folder)

    def push_ear_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | None = None, **kwargs: Any
    ) -> str:
        """
        Uploads what `save_ear` writes; a card that is there stays.

        Args:
            repo_id (`str`): Repository, which is made if there is none.
            private, token: As in [`~transformers.PreTrainedModel.push_to_hub`].
            kwargs: For `HfApi.upload_folder`, such as `revision`, `create_pr` and `commit_message`.

        Returns:
            `str`: Address of the commit.
        """
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent, repo_id)
            self.save_ear(folder)
            if any(api.file_exists(repo_id, "README.md", revision=name) for name in {kwargs.get("revision"), None}):
                (folder / "README.md").unlink()
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **kwargs))

    def name_base(self, captioner: PreTrainedModel, is_stock: bool) -> None:
        """Notes where the captioner came from, and whether it is as it was there."""
        self.captioner_is_stock = is_stock
        self.config.base_model_fingerprint = self.fingerprint()
        if captioner.name_or_path:
            self.config.base_model = captioner.name_or_path
            self.config.base_model_revision = getattr(captioner.config, "_commit_hash", None)

    def load_ear(self, folder: Path, config: EarConfig) -> None:
        """
        Loads an ear from a folder into this model, which was built by that ear's configuration.

        Raises:
            ValueError: if the ear was made for another captioner, lacks a weight or has one too many.
        """
        self.grow_vocabulary(config.get_text_config().vocab_size)
        ours, theirs = self.fingerprint(), config.base_model_fingerprint or {}
        differing = [name for name in sorted(ours.keys() & theirs.keys()) if not alike(ours[name], theirs[name])]
        if differing or not theirs:
            revision = f" at {config.base_model_revision}" if config.base_model_revision else ""
            raise ValueError(
                f"The ear in {folder} was made for {config.base_model}{revision}. This captioner is another one: its "
                f"{', '.join(differing) or 'parts'} differ."
            )
        parts = {name: t for name, t in self.ear.state_dict().items() if name.split(".")[0] in EAR_PARTS}
        state = load_file(folder / EAR_FILE)
        info = {
            "missing_keys": parts.keys() - state.keys(),
            "unexpected_keys": state.keys() - parts.keys(),
            "mismatched_keys": [(n,) for n in parts.keys() & state.keys() if parts[n].shape != state[n].shape],
        }
        require_all_weights(info, str(folder))
        self.ear.load_state_dict(state, strict=False)
        self.suppress_placeholders()

    @torch.no_grad()
    def fingerprint(self) -> dict[str, list[float]]:
        """Some values of the captioner's word embedding and projector, by their names."""
        embeddings, modules = self.get_input_embeddings(), dict(find_captioner(self).base_model.named_modules())
        with at_hand(embeddings):
            values = {"word embedding": spread(embeddings.weight[: self.config.audio_token_index])}
        for path in modules.keys() & set(PROJECTORS):
            with at_hand(modules[path]):
                values |= {name: spread(p) for name, p in modules[path].named_parameters(prefix=path) if p.ndim > 1}
        return values

    def load_audio_encoder(self, path: str | os.PathLike[str]) -> AudioBackbone:
        """See [`EarMixin.load_audio_encoder`]."""
        return self.ear.load_audio_encoder(path)

    def add_media_tokens(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """
        Adds `<audio>` and `<prefix>` to a tokenizer and tells the configuration their indices.

        The vocabulary grows if it has no spare ids for them.
        """
        tokenizer.add_special_tokens(
            {"additional_special_tokens": ["<audio>", "<prefix>"]}, replace_extra_special_tokens=False
        )
        indices = tokenizer.convert_tokens_to_ids(["<audio>", "<prefix>"])
        self.config.audio_token_index, self.config.prefix_token_index = indices
        self.grow_vocabulary(max(indices) + 1)
        self.suppress_placeholders()

    @torch.no_grad()
    def grow_vocabulary(self, size: int) -> None:
        """Grows a vocabulary smaller than `size`; new rows are the mean of the others, on every machine the same."""
        old = self.get_input_embeddings().num_embeddings
        if old < size:
            self.resize_token_embeddings(size, mean_resizing=False)
            for layer in (self.get_input_embeddings(), self.get_output_embeddings()):
                for parameter in layer.parameters():
                    parameter[old:] = parameter[:old].mean(0)

    def suppress_placeholders(self) -> None:
        """Makes generation never write a placeholder: they are for prompts."""
        indices = {self.config.audio_token_index, self.config.prefix_token_index}
        self.generation_config.suppress_tokens = sorted(indices.union(self.generation_config.suppress_tokens or ()))

    # The prefix -----------------------------------------------------------------------------------------------------

    def add_prefix(self, length: int = 16, position: PrefixPosition = "after_media") -> None:
        """
        Gives the model new soft prefix tokens, normal with standard deviation 1e-4.

        Args:
            length: Number of soft tokens.
            position: `"after_media"` or `"front"` (see [`DaliConfig`]).
        """
        self.set_prefix(torch.randn(length, self.config.get_text_config().hidden_size) * PREFIX_STD, position)

    def remove_prefix(self) -> None:
        """Takes the soft prefix tokens off; prompts without `<prefix>` give what they gave before."""
        self.ear.prefix = None
        self.config.prefix_length = 0

    def load_prefix(self, path: str | os.PathLike[str], position: PrefixPosition | None = None) -> None:
        """
        Loads soft prefix tokens from a PEFT prompt-tuning adapter.

        Args:
            path: Folder or Hub id of the adapter.
            position: `"after_media"` or `"front"`; the configuration's by default.

        Raises:
            ValueError: if the adapter is not prompt tuning, or its tokens have another width than the language model.
        """
        adapter = PeftConfig.from_pretrained(str(path))
        if adapter.peft_type != "PROMPT_TUNING":
            raise ValueError(f"{path} holds a {adapter.peft_type} adapter, a PROMPT_TUNING one is needed.")
        prefix = load_peft_weights(str(path), device="cpu")["prompt_embeddings"]
        width = self.config.get_text_config().hidden_size
        if prefix.shape[-1] != width:
            raise ValueError(f"The prefix in {path} is {prefix.shape[-1]} wide, the language model {width}.")
        self.set_prefix(prefix, position or self.config.prefix_position)

    def save_prefix(self, path: str | os.PathLike[str]) -> None:
        """Saves the soft prefix tokens as a PEFT prompt-tuning adapter, which `load_prefix` and peft load."""
        if self.ear.prefix is None:
            raise ValueError("The model holds no prefix to save.")
        text = self.config.get_text_config()
        PromptTuningConfig(
            task_type=TaskType.CAUSAL_LM,
            num_virtual_tokens=len(self.ear.prefix),
            token_dim=text.hidden_size,
            num_transformer_submodules=1,
            num_attention_heads=text.num_attention_heads,
            num_layers=text.num_hidden_layers,
            base_model_name_or_path=self.name_or_path or None,
            inference_mode=True,
        ).save_pretrained(str(path))
        weights = {"prompt_embeddings": self.ear.prefix.detach().cpu().contiguous()}
        save_file(weights, Path(path) / "adapter_model.safetensors", metadata={"format": "pt"})

    def set_prefix(self, prefix: torch.Tensor, position: PrefixPosition = "after_media") -> None:
        """Gives the model the soft prefix tokens `prefix` [length, hidden size], standing at `position`."""
        if position not in get_args(PrefixPosition):
            raise ValueError(f"A prefix stands `after_media` or in `front`, not at `{position}`.")
        self.ear.prefix = nn.Parameter(prefix.to(self.device, self.dtype).clone())
        self.config.prefix_length = len(prefix)
        self.config.prefix_position = position

    # Generation and sound -------------------------------------------------------------------------------------------

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Writes text.

        All arguments are those of [`~transformers.GenerationMixin.generate`].

        Raises:
            ValueError: if logits are not finite, as broken weights make them: their text would be blanks.
        """
        processors = LogitsProcessorList([FiniteLogits(), *(logits_processor or [])])
        return super().generate(inputs, generation_config, processors, **kwargs)

    def get_audio_tokens(self, input_features: torch.Tensor) -> torch.Tensor:
        """See [`EarMixin.get_audio_tokens`]."""
        return self.ear.get_audio_tokens(input_features)

    def get_audio_features(
        self, input_features: torch.Tensor, input_features_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """See [`EarMixin.get_audio_features`]."""
        return self.ear.get_audio_features(input_features, input_features_mask, **kwargs)


class FiniteLogits(LogitsProcessor):
    """Lets finite logits through as they are, and -inf, by which other processors forbid tokens."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """
        Raises:
            ValueError: if a logit is NaN or +inf.
        """
        if not (scores < torch.inf).all():
            raise ValueError("The logits are not finite: do the model's weights, or its inputs, hold NaN or infinity?")
        return scores


def find_captioner(model: PreTrainedModel) -> PreTrainedModel:
    """The captioner of a model with an ear, without what PEFT has wrapped around it."""
    captioner = getattr(model, "captioner", model)
    return captioner.get_base_model() if hasattr(captioner, "get_base_model") else captioner


@contextmanager
def at_hand(module: nn.Module) -> Iterator[None]:
    """While it is entered, a module's weights are there, wherever accelerate keeps them otherwise."""
    with ExitStack() as stack:
        for part in module.modules():
            stack.enter_context(align_module_device(part))
        yield


def find_ear(path: str | os.PathLike[str], **hub: Any) -> Path:
    """The folder of an ear, which is downloaded if `path` is a Hub id; `hub` says how."""
    files = [cached_file(path, name, **hub) for name in ("config.json", EAR_FILE)]
    return Path(files[0]).parent


def ear_fields(config: EarConfig) -> dict[str, Any]:
    """What the configuration of an ear alone tells about the ear."""
    general = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    names = {field.name for field in dataclasses.fields(EarConfig)} - general
    return {name: getattr(config, name) for name in names} | {"ear_only": False}


def spread(tensor: torch.Tensor, count: int = 16) -> list[float]:
    """`count` values of a tensor, evenly spread; none of one that is quantised."""
    places = torch.linspace(0, tensor.numel() - 1, count, dtype=torch.float64).long()
    return tensor.flatten()[places.to(tensor.device)].float().tolist() if tensor.is_floating_point() else []


def alike(ours: list[float], theirs: list[float]) -> bool:
    """Whether values are the same but for what another dtype rounds off; what is quantised tells nothing."""
    one, other = torch.tensor(ours), torch.tensor(theirs)
    return not ours or not theirs or bool((one - other).norm() <= 0.02 * one.norm())


def save_card(config: EarConfig, folder: Path) -> None:
    """Writes the model card into a folder, unless there is one."""
    if not (folder / "README.md").exists():
        model_card(config, folder.name).save(folder / "README.md")


def require_all_weights(info: dict[str, Any], source: str, ignore_mismatched_sizes: bool = False) -> None:
    """
    Raises:
        ValueError: if loading `source` left weights at random values or out of the model; lists them.
    """
    problems = {
        "missing in the checkpoint": info["missing_keys"],
        "without a place in the model": info["unexpected_keys"],
        "of another shape": [] if ignore_mismatched_sizes else [key for key, *_ in info["mismatched_keys"]],
    }
    lines = [f"- {what}: {', '.join(sorted(keys))}" for what, keys in problems.items() if keys]
    if lines:
        raise ValueError(f"The weights of {source} do not fit the model.\n" + "\n".join(lines))


__all__ = ["DaliMixin", "FiniteLogits", "ear_fields", "find_captioner", "find_ear", "require_all_weights"]
