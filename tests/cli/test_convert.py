"""fastlora convert: files of other tools give what PEFT computes with their factors, or one line that says why not."""

import json
import sys
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fastlora
from fastlora.adapters.foreign import read_foreign
from tests.support.tiny_gpt2 import make_gpt2
from tests.support.tiny_llama import make_llama

peft = pytest.importorskip("peft")

IDS = torch.arange(20).view(2, 10) % 19
# Two ranks and two alphas; a square layer, whose factors would fit the wrong way round as well.
LAYERS = {
    "model.layers.0.self_attn.q_proj": (3, 6.0),
    "model.layers.1.self_attn.q_proj": (3, 1.5),
    "model.layers.1.mlp.down_proj": (2, 6.0),
}


def factors(dtype=torch.float32):
    """A, B and alpha by path, and the model of PEFT's that has them."""
    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=list(LAYERS),
        rank_pattern={"down_proj": 2},
        alpha_pattern={"layers.1.self_attn.q_proj": 1.5},
    )
    model = peft.get_peft_model(make_llama(), config)
    found = {}
    for path, (_, alpha) in LAYERS.items():
        layer = model.get_submodule(f"base_model.model.{path}")
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        for parameter in (a, b):
            nn.init.normal_(parameter, std=0.3)
            parameter.data = parameter.data.to(dtype).float()
        found[path] = (a.detach().to(dtype), b.detach().to(dtype), alpha)
    return model, found


def kohya(found, prefix="lora_te_"):
    state = {}
    for path, (a, b, alpha) in found.items():
        name = prefix + path.replace(".", "_")
        state |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b, f"{name}.alpha": torch.tensor(alpha)}
    return state


def comfyui(found):
    """Dotted paths below the model's name."""
    state = {}
    for path, (a, b, alpha) in found.items():
        name = f"diffusion_model.{path}"
        state |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b, f"{name}.alpha": torch.tensor([alpha])}
    return state


def diffusers(found):
    return {
        f"transformer.{path}.lora_{factor}.weight": tensor
        for path, (a, b, _) in found.items()
        for factor, tensor in zip("AB", (a, b), strict=True)
    }


def loralib(found):
    return {f"{path}.lora_{f}": t for path, (a, b, _) in found.items() for f, t in zip("AB", (a, b), strict=True)}


def metadata(found):
    """As diffusers writes it: the fields of PEFT's configuration below the model's name."""
    alphas = {path: alpha for path, (_, _, alpha) in found.items()}
    return {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 6, "transformer.alpha_pattern": alphas})}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    make_llama().save_pretrained(directory)
    for file in directory.glob("*.safetensors"):
        file.unlink()  # the configuration is all that is read
    return directory


FILES = {
    "kohya": lambda found, path: save_file(kohya(found), path),
    "kohya, no prefix": lambda found, path: save_file(kohya(found, ""), path),
    "ComfyUI": lambda found, path: save_file(comfyui(found), path),
    "diffusers": lambda found, path: save_file(diffusers(found), path, metadata(found)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", FILES)
def test_what_comes_out_computes_what_went_in(kind, dtype, fastlora_cli, base, tmp_path):
    model, found = factors(dtype)
    FILES[kind](found, tmp_path / "lora.safetensors")
    result = fastlora_cli("convert", tmp_path / "lora.safetensors", "--base", base, "--output", tmp_path / "out")
    assert result.code == 0, result.err
    assert result.text == f"Converted 3 layers; wrote {tmp_path}/out"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    expected = model(IDS).logits
    loaded = make_llama()
    assert set(fastlora.load_adapter(loaded, tmp_path / "out")) == set(LAYERS)
    torch.testing.assert_close(loaded(IDS).logits, expected)
    in_peft = peft.PeftModel.from_pretrained(make_llama(), tmp_path / "out", autocast_adapter_dtype=False)
    torch.testing.assert_close(in_peft(IDS).logits, expected)
    stored = fastlora.adapters.files.read_adapter(tmp_path / "out")
    for path, (a, b, alpha) in found.items():
        assert torch.equal(stored[path].lora_a, a) and torch.equal(stored[path].lora_b, b)
        assert stored[path].lora_a.dtype == dtype and stored[path].scaling == alpha / LAYERS[path][0]


def test_alpha_where_the_file_holds_none(fastlora_cli, base, tmp_path):
    """The rank, or what is given; of loralib's files nothing is guessed."""
    _, found = factors()
    for kind, name in ((diffusers, "diffusers"), (loralib, "loralib")):
        save_file(kind(found), tmp_path / f"{name}.safetensors")
    convert = lambda name, *more: fastlora_cli(  # noqa: E731
        "convert", tmp_path / f"{name}.safetensors", "--base", base, "--output", tmp_path / f"out{len(more)}", *more
    )
    scalings = lambda number: {  # noqa: E731
        layer.scaling for layer in fastlora.adapters.files.read_adapter(tmp_path / f"out{number}").values()
    }
    assert convert("diffusers").code == 0 and scalings(0) == {1.0}
    result = convert("loralib", "--prefix", "model.", "--prefix", "")
    assert result.code == 2 and "holds no alpha" in result.error_line and not (tmp_path / "out4").exists()
    assert convert("loralib", "--alpha", 6).code == 0 and scalings(2) == {2.0, 3.0}
    save_file(kohya(found), tmp_path / "kohya.safetensors")
    result = fastlora_cli(
        "convert", tmp_path / "kohya.safetensors", "--base", base, "--output", tmp_path / "no", "--alpha", 5
    )
    assert result.code == 2 and "holds the alpha 6" in result.error_line and not (tmp_path / "no").exists()


def change(state, key, value=None):
    found = next(name for name in state if key in name)
    tensor = state.pop(found)
    if value is not None:
        state[found] = value(tensor) if callable(value) else value
    return state


def renamed(state, old, new):
    return {name.replace(old, new): tensor for name, tensor in state.items()}


REFUSED = {
    "no linear layer has these names: lora_te_model_layers_7_self_attn_q_proj": lambda s: renamed(s, "_0_", "_7_"),
    "no linear layer has these names: lora_te_model_embed_tokens": lambda s: {
        **s,
        "lora_te_model_embed_tokens.lora_down.weight": torch.ones(2, 19),
        "lora_te_model_embed_tokens.lora_up.weight": torch.ones(12, 2),
    },
    "entries of other kinds: lora_te_x.dora_scale": lambda s: {**s, "lora_te_x.dora_scale": torch.ones(2)},
    "missing: lora_te_model_layers_0_self_attn_q_proj (lora_B)": lambda s: change(s, "_0_self_attn_q_proj.lora_up"),
    "alpha without a branch: lora_te_model_lm_head": lambda s: {**s, "lora_te_model_lm_head.alpha": torch.tensor(1.0)},
    "shapes differ: lora_te_model_layers_0_self_attn_q_proj: A [3, 11]": lambda s: change(
        s, "_0_self_attn_q_proj.lora_down", lambda t: t[:, 1:].contiguous()
    ),
    "shapes differ: lora_te_model_layers_1_mlp_down_proj: A [2, 20, 1, 1]": lambda s: change(
        s, "down_proj.lora_down", lambda t: t[:, :, None, None].contiguous()
    ),
    "dtype not one of F64, F32, F16, BF16": lambda s: change(s, "down_proj.lora_up", lambda t: t.to(torch.int8)),
    "alpha is no finite number": lambda s: change(s, "_0_self_attn_q_proj.alpha", torch.tensor(float("nan"))),
    "these stand for one layer: lora_te1_model_layers_0_self_attn_q_proj and lora_te2_": lambda s: (
        renamed(s, "lora_te_", "lora_te1_")
        | {name: t.clone() for name, t in renamed(s, "lora_te_", "lora_te2_").items()}
    ),
    "holds no LoRA entry": lambda s: {},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_map_is_refused_with_the_list(message, fastlora_cli, base, tmp_path):
    _, found = factors()
    save_file(REFUSED[message](kohya(found)), tmp_path / "lora.safetensors")
    result = fastlora_cli("convert", tmp_path / "lora.safetensors", "--base", base, "--output", tmp_path / "out")
    assert result.code == 2 and message in result.error_line, result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora.safetensors"]


def test_one_models_entries_of_a_file_for_several(fastlora_cli, base, tmp_path):
    model, found = factors()
    other = {"lora_unet_x_y.lora_down.weight": torch.ones(2, 3), "lora_unet_x_y.lora_up.weight": torch.ones(3, 2)}
    save_file(kohya(found, "lora_te1_") | other, tmp_path / "lora.safetensors")
    arguments = ["convert", tmp_path / "lora.safetensors", "--base", base, "--output", tmp_path / "out"]
    result = fastlora_cli(*arguments, "--prefix", "lora_te1_")
    assert result.code == 0 and "left out 2 entries that do not begin with lora_te1_" in result.text
    loaded = make_llama()
    fastlora.load_adapter(loaded, tmp_path / "out")
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)
    result = fastlora_cli(*arguments, "--prefix", "lora_te1_")
    assert result.code == 2 and "is not empty" in result.error_line


@pytest.mark.parametrize("name", ["lora.pt", "lora.safetensors"])
def test_a_pickle_is_refused_with_the_remedy_and_never_opened(name, fastlora_cli, base, tmp_path):
    _, found = factors()
    torch.save(loralib(found), tmp_path / name)
    result = fastlora_cli("convert", tmp_path / name, "--base", base, "--output", tmp_path / "out")
    assert result.code == 2 and "is a pickle, which can run code when opened and is refused" in result.error_line
    assert "save_file" in result.error_line and not (tmp_path / "out").exists()
    if not name.endswith(".pt"):
        return  # torch.load goes by that
    state = torch.load(tmp_path / name, weights_only=True)  # the remedy, word for word
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "adapter.safetensors")
    arguments = ["--base", base, "--output", tmp_path / "out", "--alpha", 1]
    assert fastlora_cli("convert", tmp_path / "adapter.safetensors", *arguments).code == 0


@pytest.mark.parametrize("data", [b"", b"\xff" * 64, (8).to_bytes(8, "little") + b"{]      "])
def test_damaged_files(data, fastlora_cli, base, tmp_path):
    (tmp_path / "lora.safetensors").write_bytes(data)
    arguments = ["--base", base, "--output", tmp_path / "out"]
    result = fastlora_cli("convert", tmp_path / "lora.safetensors", *arguments)
    assert result.code == 2 and "is damaged or is not a safetensors file" in result.error_line
    result = fastlora_cli("convert", tmp_path / "absent.safetensors", *arguments)
    assert result.code == 2 and "there is no file" in result.error_line and not (tmp_path / "out").exists()


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(4, 4)
        self.to_out = nn.ModuleList([nn.Linear(4, 4), nn.Dropout()])


class UNet(nn.Module):
    """A model by diffusers' conventions."""

    def __init__(self):
        super().__init__()
        self.mid = nn.ModuleDict({"attn1": Attention()})
        self.a_b, self.a = nn.Linear(4, 4), nn.ModuleDict({"b": nn.Linear(4, 4)})

    @classmethod
    def load_config(cls, directory):
        return json.loads((directory / "config.json").read_text())

    @classmethod
    def from_config(cls, config):
        return cls()


def pair(name, down, up):
    return {f"{name}{down}": torch.ones(2, 4), f"{name}{up}": torch.full((4, 2), 2.0)}


@pytest.mark.parametrize(
    "name, down, up, path",
    [
        ("unet.mid.attn1.processor.to_q", "_lora.down.weight", "_lora.up.weight", "mid.attn1.to_q"),
        ("mid.attn1.processor.to_out", "_lora.down.weight", "_lora.up.weight", "mid.attn1.to_out.0"),
        ("unet.mid.attn1.to_q", ".lora.down.weight", ".lora.up.weight", "mid.attn1.to_q"),
        ("a.b", ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight", "a.b"),
        ("lora_unet_mid_attn1_to_out_0", ".lora_down.weight", ".lora_up.weight", "mid.attn1.to_out.0"),
        ("base_model.model.mid.attn1.to_q", ".lora_A.default.weight", ".lora_B.default.weight", "mid.attn1.to_q"),
    ],
)  # fmt: skip
def test_names_of_diffusers_attentions(name, down, up, path, tmp_path):
    save_file(pair(name, down, up), tmp_path / "lora.safetensors")
    layers = read_foreign(tmp_path / "lora.safetensors", UNet()).layers
    assert list(layers) == [path] and torch.equal(layers[path].lora_a, torch.ones(2, 4))
    assert layers[path].alpha == 2


def test_an_underscored_name_of_two_layers_is_not_guessed(tmp_path):
    save_file(pair("lora_unet_a_b", ".lora_down.weight", ".lora_up.weight"), tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="these may stand for several layers: lora_unet_a_b"):
        read_foreign(tmp_path / "lora.safetensors", UNet())
    twice = pair("a.b", ".lora_A.weight", ".lora_B.weight") | pair("a.b", ".lora_down.weight", ".lora_up.weight")
    save_file(twice, tmp_path / "twice.safetensors")
    with pytest.raises(ValueError, match="entries of other kinds: a.b.lora"):
        read_foreign(tmp_path / "twice.safetensors", UNet())


@pytest.mark.parametrize("given", [{"unet.use_dora": True}, {"unet.lora_alpha": "6"}, {"unet.alpha_pattern": 1}])
def test_a_configuration_of_diffusers_that_is_no_plain_lora(given, tmp_path):
    state = pair("a.b", ".lora_A.weight", ".lora_B.weight")
    save_file(state, tmp_path / "lora.safetensors", {"lora_adapter_metadata": json.dumps(given)})
    with pytest.raises(ValueError, match="its configuration .* has .*, not served here"):
        read_foreign(tmp_path / "lora.safetensors", UNet())
    save_file(state, tmp_path / "rs.safetensors", {"lora_adapter_metadata": '{"unet.use_rslora": true}'})
    assert read_foreign(tmp_path / "rs.safetensors", UNet()).rslora


def test_models_of_diffusers_and_gpt2(fastlora_cli, tmp_path, monkeypatch):
    library = ModuleType("diffusers")
    library.UNet = UNet
    monkeypatch.setitem(sys.modules, "diffusers", library)
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text('{"_class_name": "UNet"}')
    save_file(pair("unet.a.b", ".lora_A.weight", ".lora_B.weight"), tmp_path / "lora.safetensors")
    arguments = ["convert", tmp_path / "lora.safetensors", "--base", tmp_path / "unet", "--output"]
    assert fastlora_cli(*arguments, tmp_path / "out").code == 0
    assert fastlora.load_adapter(UNet(), tmp_path / "out") == ["a.b"]
    (tmp_path / "unet" / "config.json").write_text('{"_class_name": "VNet"}')
    result = fastlora_cli(*arguments, tmp_path / "no")
    assert result.code == 2 and "VNet, which this version of diffusers has not" in result.error_line
    make_gpt2().save_pretrained(tmp_path / "gpt2")
    name = "lora_te_transformer_h_0_attn_c_proj"
    state = {f"{name}.lora_down.weight": torch.ones(2, 12), f"{name}.lora_up.weight": torch.ones(12, 2)}
    save_file(state, tmp_path / "gpt2.safetensors")
    result = fastlora_cli(
        "convert", tmp_path / "gpt2.safetensors", "--base", tmp_path / "gpt2", "--output", tmp_path / "c"
    )
    assert result.code == 0, result.err
    assert fastlora.load_adapter(make_gpt2(), tmp_path / "c") == ["transformer.h.0.attn.c_proj"]
    assert json.loads((tmp_path / "c" / "adapter_config.json").read_text())["fan_in_fan_out"] is True
