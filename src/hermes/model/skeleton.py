"""Models without weights: built from a configuration, and made ready to run except for what is on disk.

`build_skeleton` does what `from_pretrained` does before it opens a weight file, and `finish_skeleton` what it does
after it has read one, both through transformers' own code: the same class, dtypes, attention, buffers, ties, initial
values of missing parameters, and the same report. What lies between, the bytes, is `mapping` and the engine.
"""

import copy
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hermes.checkpoint.open import open_checkpoint
from hermes.checkpoint.quantized import METHOD
from hermes.errors import CheckpointError, HermesError, ModelError
from hermes.model.mapping import WeightMap, is_transformers_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["AUTO_CLASSES", "build_skeleton", "finish_skeleton", "move_values"]

logger = logging.getLogger(__name__)

AUTO_CLASSES = {
    "text-generation": ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForImageTextToText"),
    "text2text-generation": ("AutoModelForSeq2SeqLM",),
    "embedding": ("AutoModel",),
    "feature-extraction": ("AutoModel",),
    "fill-mask": ("AutoModelForMaskedLM",),
    "text-classification": ("AutoModelForSequenceClassification",),
    "token-classification": ("AutoModelForTokenClassification",),
    "question-answering": ("AutoModelForQuestionAnswering",),
    "image-classification": ("AutoModelForImageClassification",),
    "zero-shot-image-classification": ("AutoModelForZeroShotImageClassification",),
    "image-text-to-text": ("AutoModelForImageTextToText",),
    "automatic-speech-recognition": ("AutoModelForSpeechSeq2Seq", "AutoModelForCTC"),
    "audio-classification": ("AutoModelForAudioClassification",),
}
"""Auto classes by task; the first one that knows the model's configuration is taken."""

_MODEL_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
_NUM_NAMED = 5


def build_skeleton(
    directory: Path,
    *,
    auto_class: str | type | None = None,
    task: str | None = None,
    dtype: torch.dtype | None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> "PreTrainedModel":
    """The model that `from_pretrained(directory)` would give, in eval mode, with every tensor on the meta device.

    Args:
        directory: holds config.json; weight files are looked at only if neither `dtype` nor the configuration has one.
        auto_class: a model class or auto class, or the name of one; without it `task` decides, then the configuration.
        task: a key of `AUTO_CLASSES`.
        dtype: None is `from_pretrained`'s "auto": the configuration's, else the checkpoint's.
        trust_remote_code: allow modelling code from `directory` to run; without it none is.
        attn_implementation: as in transformers, which picks sdpa where the model has it.

    Raises:
        CheckpointError: there is no readable config.json.
        ModelError: the architecture is unknown, of another task, quantised in another way than ours, or its
            configuration makes no model.
    """
    config = _config(directory, trust_remote_code, attn_implementation)
    try:
        model_class, config = _model_class(config, auto_class, task, directory, trust_remote_code)
        return _instance(model_class, config, dtype, directory, trust_remote_code)
    except HermesError:
        raise
    except Exception as error:  # transformers raises everything here, from KeyError to its own validation errors
        raise ModelError(f"{directory}: no model can be built from its config.json: {_one_line(error)}") from error


def finish_skeleton(model: nn.Module, weights: WeightMap, *, is_built: bool = False) -> None:
    """Give `model` everything that is not on disk; exactly what `weights.sources` holds is on the meta device after.

    A skeleton of transformers gets its buffers, its missing parameters (initialised by the model itself, with torch's
    global generator, in `from_pretrained`'s order) and its ties, and transformers reports what was missing. In any
    other module, and in a transformers model that already has values, what is on disk is dropped from memory and the
    rest stays as it is; a module in training mode stays so. Persistent buffers are treated as parameters are.
    `is_built` says that the model is `build_skeleton`'s: some make a few parameters on no device but the CPU.

    Raises ModelError where something has no value anywhere.
    """
    is_built = is_built or (is_transformers_model(model) and all(parameter.is_meta for parameter in model.parameters()))
    if weights.unexpected and not is_built:
        shown = ", ".join(weights.unexpected[:_NUM_NAMED])
        logger.warning("%d tensors of the checkpoint are not used: %s", len(weights.unexpected), shown)
    _drop_mapped(model, weights)
    if is_built:
        _finish_transformers(model, weights)
    on_disk = {id(tensor) for name, tensor in _tensors(model) if name in weights.sources}
    if empty := [name for name, tensor in _tensors(model) if tensor.is_meta and id(tensor) not in on_disk]:
        more = f" and {len(empty) - _NUM_NAMED} more" if len(empty) > _NUM_NAMED else ""
        raise ModelError(
            f"no value for {', '.join(empty[:_NUM_NAMED])}{more}: on the meta device and not in the checkpoint; "
            "build the module on the CPU"
        )


def move_values(module: nn.Module, device: torch.device) -> None:
    """Put what is not on disk (buffers, initialised parameters) on a device; ties stay ties."""
    moved: dict[int, torch.Tensor] = {}

    def on_device(_: str, tensor: torch.Tensor) -> torch.Tensor | None:
        if tensor.is_meta:
            return None
        if id(tensor) not in moved:
            there = tensor.detach().to(device)
            is_parameter = isinstance(tensor, nn.Parameter)
            moved[id(tensor)] = nn.Parameter(there, tensor.requires_grad) if is_parameter else there
        return moved[id(tensor)]

    _replace(module, on_device)


def _config(directory: Path, trust_remote_code: bool, attn_implementation: str | None) -> Any:
    path = directory / "config.json"
    try:
        stored = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}; give the directory of a model") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({_one_line(error)}); download it again") from error
    if not isinstance(stored, dict):
        raise CheckpointError(f"{path}: not a JSON object; download it again")
    if quantization := stored.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        if method != METHOD:
            raise ModelError(
                f"{directory}: weights quantised by {str(method)[:40]!r} are not read, only those of hermes pack "
                "--quantize are; use the unquantised model"
            )
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(directory), trust_remote_code=trust_remote_code, local_files_only=True)
        if quantization:
            del config.quantization_config  # ours, and transformers knows nothing of it
        if attn_implementation is not None:
            config._attn_implementation = attn_implementation  # a property that hands it on to sub-configurations
    except Exception as error:
        hint = "; --trust-remote-code lets it" if stored.get("auto_map") and not trust_remote_code else ""
        named = stored.get("model_type") or stored.get("architectures") or "(none named)"
        raise ModelError(f"{directory}: unsupported architecture {named!r}: {_one_line(error)}{hint}") from error
    return config


def _model_class(
    config: Any, wanted: str | type | None, task: str | None, directory: Path, trust_remote_code: bool
) -> tuple[Any, Any]:
    """The class, and the configuration it takes: of a multimodal one, a text model takes only the text part."""
    import transformers

    if wanted is None and task is not None and task not in AUTO_CLASSES:
        raise ModelError(f"unknown task {task!r}; known are {', '.join(AUTO_CLASSES)}")
    names = [wanted] if wanted is not None else AUTO_CLASSES[task] if task is not None else (config.architectures or ())
    remote = {ref.rpartition(".")[2]: ref for ref in _remote_classes(config).values()} if trust_remote_code else {}
    for name in names or ("AutoModel",):
        if wanted is None and task is None and name in remote:
            return _remote_class(remote[name], directory), config
        found = _named(name, config) if isinstance(name, str) else name
        if found is not None and hasattr(found, "_model_mapping"):
            found = _from_auto_class(found, config, directory, trust_remote_code)
        if found is not None and issubclass(found, transformers.PreTrainedModel):
            sub_configs = getattr(config, "sub_configs", {})
            text = "text_config" in sub_configs and getattr(found, "config_class", None) is sub_configs["text_config"]
            return found, config.get_text_config() if text else config
    asked = " or ".join(str(getattr(name, "__name__", name)) for name in names) or "any model"
    raise ModelError(f"{directory}: model type {config.model_type!r} cannot be built as {asked}")


def _named(name: str, config: Any) -> Any:
    """A class of transformers, None if there is no such; of its configuration's package before all others are read."""
    import transformers

    package = sys.modules.get(type(config).__module__.rpartition(".")[0])
    return getattr(package, name, None) or getattr(transformers, name, None)


def _from_auto_class(auto: Any, config: Any, directory: Path, trust_remote_code: bool) -> Any:
    """What an auto class picks for this configuration; None if it knows nothing for it."""
    from transformers.models.auto import auto_factory

    remote = _remote_classes(config).get(auto.__name__)
    if remote is not None and trust_remote_code:
        return _remote_class(remote, directory, auto)
    known = type(config) in auto._model_mapping
    return auto_factory._get_model_class(config, auto._model_mapping) if known else None


def _remote_classes(config: Any) -> dict[str, str]:
    """Auto class to the class in the model's own code."""
    stored = getattr(config, "auto_map", None) or {}
    return {auto: ref for auto, ref in stored.items() if isinstance(ref, str) and auto.startswith("AutoModel")}


def _remote_class(reference: str, directory: Path, auto: Any = None) -> Any:
    from transformers.dynamic_module_utils import get_class_from_dynamic_module
    from transformers.models.auto import auto_factory

    found = get_class_from_dynamic_module(reference, str(directory), local_files_only=True)
    found.register_for_auto_class(auto_class="AutoModel" if auto is None else auto)
    return auto_factory.add_generation_mixin_to_remote_model(found)


def _instance(
    model_class: Any, config: Any, dtype: torch.dtype | None, directory: Path, trust_remote_code: bool
) -> Any:
    """As in `from_pretrained`, from the settled class to the opened weight file, and its last steps."""
    from transformers import modeling_utils
    from transformers.monkey_patching import patch_output_recorders

    wanted = dtype or config.dtype or _stored_dtype(directory)
    # Sets it on the configuration and its parts, too. A copy: transformers keeps some configurations for itself.
    config, dtype = modeling_utils._get_dtype(
        wanted,
        checkpoint_files=None,
        config=copy.deepcopy(config),
        sharded_metadata=None,
        state_dict=None,
        weights_only=True,
    )
    config.name_or_path = str(directory)
    with ExitStack() as stack:
        for context in model_class.get_init_context(
            dtype, is_quantized=False, _is_ds_init_called=False, allow_all_kernels=False
        ):
            stack.enter_context(context)
        model = model_class(config)
        patch_output_recorders(model)
    model.eval()
    if model.can_generate() and hasattr(model, "adjust_generation_fn"):
        model.adjust_generation_fn(
            generation_config=None,
            from_auto_class=True,
            from_pipeline=None,
            pretrained_model_name_or_path=str(directory),
            cache_dir=None,
            force_download=False,
            proxies=None,
            local_files_only=True,
            token=None,
            revision=None,
            subfolder="",
            trust_remote_code=trust_remote_code,
        )
    return model


def _stored_dtype(directory: Path) -> torch.dtype:
    """The dtype of the first tensor on disk that a model can be built in."""
    entries = open_checkpoint(directory).tensors.values()
    for entry in sorted(entries, key=lambda entry: (entry.extent.file, entry.extent.offset)):
        if entry.dtype in _MODEL_DTYPES:
            return _MODEL_DTYPES[entry.dtype]
    return torch.float32


def _finish_transformers(model: Any, weights: WeightMap) -> None:
    from transformers.modeling_utils import LoadStateDictConfig
    from transformers.utils.loading_report import LoadStateDictInfo

    dtype = model.config.dtype
    _keep_dtypes(model, weights, model._get_dtype_plan(dtype))
    for name, tensor in _tensors(model):
        if name in weights.sources:
            tensor._is_hf_initialized = True  # as on a loaded one: initialisation passes it by and draws no numbers
            if isinstance(tensor, nn.Parameter):
                tensor.requires_grad_(tensor.is_floating_point())  # likewise
    info = LoadStateDictInfo(
        missing_keys=set(model.state_dict()) - weights.sources.keys(),
        unexpected_keys=set(weights.unexpected),
        mismatched_keys=set(),
        error_msgs=[],
        conversion_errors={},
        skipped_pp_keys=set(),
    )
    config = LoadStateDictConfig(pretrained_model_name_or_path=model.name_or_path, dtype=dtype)
    model._finalize_model_loading(model, config, info)
    model.eval()


def _keep_dtypes(model: nn.Module, weights: WeightMap, plan: dict[str, torch.dtype]) -> None:
    """Give what a half-precision model wants kept in float32 its dtype; as in transformers, only if it is on disk."""
    if not plan:
        return
    patterns = [(re.compile(pattern.replace("*", ".*")), dtype) for pattern, dtype in plan.items()]

    def kept(name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        wanted = next((dtype for pattern, dtype in patterns if pattern.search(name)), None)
        if name not in weights.sources or wanted is None or wanted is tensor.dtype:
            return None
        return _meta_like(tensor, wanted)

    _replace(model, kept)


def _drop_mapped(module: nn.Module, weights: WeightMap) -> None:
    on_disk = {id(tensor) for name, tensor in _tensors(module) if name in weights.sources and not tensor.is_meta}
    made: dict[int, torch.Tensor] = {}

    def dropped(_: str, tensor: torch.Tensor) -> torch.Tensor | None:
        if id(tensor) not in on_disk:
            return None
        return made.setdefault(id(tensor), _meta_like(tensor, tensor.dtype))

    _replace(module, dropped)


def _meta_like(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same without values. The layout is the plain one, in which bytes come from disk."""
    empty = torch.empty(tensor.shape, dtype=dtype, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _replace(module: nn.Module, change: Callable[[str, torch.Tensor], torch.Tensor | None]) -> None:
    """Put `change`'s tensor in the place of each one for which it gives one."""
    for prefix, child in module.named_modules():
        for table in (child._parameters, child._buffers):
            for name, tensor in table.items():
                if tensor is not None and (new := change(f"{prefix}.{name}" if prefix else name, tensor)) is not None:
                    table[name] = new


def _tensors(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Parameters and buffers under every name they have."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
