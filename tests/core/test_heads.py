"""Heads of transformers models: left out of "all-linear" as by PEFT, trained and saved whole, never lost silently."""

import copy
import pickle
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fastlora.adapters.io import load_adapter, save_adapter
from fastlora.heads import saved_modules
from fastlora.model import inject, lora_layers, merge, unmerge

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

IDS = torch.arange(1, 19).view(2, 9)
SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
DISTIL = {"vocab_size": 40, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2}
VIT = {k: v for k, v in SMALL.items() if k != "vocab_size"} | {"image_size": 8, "patch_size": 4}
ROBERTA = SMALL | {"max_position_embeddings": 32, "pad_token_id": 0}
MODELS = [
    ("Llama", SMALL, "ForSequenceClassification", "SEQ_CLS"),
    ("Llama", SMALL, "ForTokenClassification", "TOKEN_CLS"),
    ("Llama", SMALL, "ForQuestionAnswering", "QUESTION_ANS"),
    ("Llama", SMALL, "ForCausalLM", "CAUSAL_LM"),
    ("Qwen2", SMALL | {"num_key_value_heads": 1}, "ForSequenceClassification", "SEQ_CLS"),
    ("Bert", SMALL, "ForSequenceClassification", "SEQ_CLS"),
    ("Bert", SMALL, "ForTokenClassification", "TOKEN_CLS"),
    ("Bert", SMALL, "ForQuestionAnswering", "QUESTION_ANS"),
    ("Bert", SMALL, "ForMaskedLM", None),
    ("Roberta", ROBERTA, "ForSequenceClassification", "SEQ_CLS"),
    ("Roberta", ROBERTA, "ForTokenClassification", "TOKEN_CLS"),
    ("DistilBert", DISTIL, "ForQuestionAnswering", "QUESTION_ANS"),
    ("Electra", SMALL | {"embedding_size": 16}, "ForSequenceClassification", "SEQ_CLS"),
    ("T5", T5, "ForConditionalGeneration", "SEQ_2_SEQ_LM"),
    ("T5", T5, "ForTokenClassification", "TOKEN_CLS"),
]


def make(kind, config, task, seed=0, **options):
    torch.manual_seed(seed)
    if task in ("ForSequenceClassification", "ForTokenClassification"):
        options = {"num_labels": 3, **options}
    config = getattr(transformers, f"{kind}Config")(**{"pad_token_id": 0, **config, **options})
    return getattr(transformers, f"{kind}{task}")(config).double().eval()


def llama(seed=0, task="ForSequenceClassification", **options):
    return make("Llama", SMALL, task, seed, **options)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def disturb(model):
    """Other values wherever something trains."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def peft_config(task, targets="all-linear"):
    """For two of the tasks, PEFT 0.21 puts branches on the head and then fails, unless the head is named to it."""
    heads = {"TOKEN_CLS": ["classifier", "score"], "QUESTION_ANS": ["qa_outputs"]}.get(task)
    return peft.LoraConfig(r=2, lora_alpha=5, target_modules=targets, task_type=task, modules_to_save=heads)


@pytest.mark.parametrize(("kind", "config", "task", "peft_task"), MODELS, ids=lambda v: v if isinstance(v, str) else "")
def test_all_linear_takes_what_peft_takes(kind, config, task, peft_task):
    stock = peft.get_peft_model(make(kind, config, task), peft_config(peft_task))
    names = inject(make(kind, config, task), "all-linear", r=2)
    assert names == stock.base_model.targeted_module_names and len(names) > 5


def test_heads_of_tasks_that_peft_does_not_know():
    model = make("ViT", VIT, "ForImageClassification")
    assert not any("classifier" in name for name in inject(model, "all-linear"))
    model = make("Bert", SMALL, "ForMultipleChoice")
    assert not any("classifier" in name for name in inject(model, "all-linear"))
    plain = nn.ModuleDict({"score": nn.Linear(2, 2), "up": nn.Linear(2, 2)})  # no transformers model: as PEFT
    assert inject(plain, "all-linear") == ["score", "up"]


CASES = [case for case in MODELS if case[3] in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS") and case[0] != "T5"]


@pytest.mark.parametrize(("kind", "config", "task", "peft_task"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_a_peft_adapter_with_its_head_loads(tmp_path, kind, config, task, peft_task):
    torch.manual_seed(3)
    stock = disturb(peft.get_peft_model(make(kind, config, task), peft_config(peft_task))).eval()
    stock.save_pretrained(tmp_path)
    base = make(kind, config, task, seed=7)  # another head; the backbone is copied
    state = {k: v for k, v in make(kind, config, task).state_dict().items() if not is_of_a_head(k)}
    base.load_state_dict(state, strict=False)
    load_adapter(base, tmp_path)
    for ours, theirs in zip(outputs(base), outputs(stock), strict=True):
        torch.testing.assert_close(ours, theirs)
    trains = {name for name, p in base.named_parameters() if p.requires_grad}
    assert {name for name in trains if "lora_" not in name} == {n for n in base.state_dict() if is_of_a_head(n)}
    save_adapter(base, tmp_path / "again")
    ours = load_file(tmp_path / "again" / "adapter_model.safetensors")
    theirs = load_file(tmp_path / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def is_of_a_head(name):
    return any(part in ("score", "classifier", "qa_outputs") for part in name.split("."))


def outputs(model):
    with torch.no_grad():
        result = model(input_ids=IDS)
    return [result.start_logits, result.end_logits] if "start_logits" in result else [result.logits]


@pytest.mark.parametrize(("kind", "config", "task", "peft_task"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_peft_loads_ours_with_its_head(tmp_path, kind, config, task, peft_task):
    model = make(kind, config, task)
    found = [name for name, _ in model.named_children() if is_of_a_head(name)]
    inject(model, "all-linear", r=2, alpha=5, modules_to_save=found)
    torch.manual_seed(3)
    disturb(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_adapter(model, tmp_path)
    base = make(kind, config, task, seed=7)
    base.load_state_dict({k: v for k, v in make(kind, config, task).state_dict().items() if not is_of_a_head(k)}, False)
    assert peft.LoraConfig.from_pretrained(tmp_path).task_type == peft_task
    stock = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    for ours, theirs in zip(outputs(model), outputs(stock), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_head_that_peft_finds_by_the_end_of_its_name(tmp_path):
    """DistilBERT's pre_classifier ends in "classifier": PEFT saves it whole, too."""
    stock = peft.get_peft_model(
        make("DistilBert", DISTIL, "ForSequenceClassification"), peft_config("SEQ_CLS", ["q_lin", "v_lin"])
    )
    disturb(stock).eval().save_pretrained(tmp_path)
    model = make("DistilBert", DISTIL, "ForSequenceClassification")
    load_adapter(model, tmp_path)
    assert [name for name, _ in saved_modules(model)] == ["pre_classifier", "classifier"]
    torch.testing.assert_close(logits(model), logits(stock))


def test_a_module_saved_whole_trains_and_survives_copies_merging_and_a_second_injection(tmp_path):
    model = llama()
    inject(model, ["q_proj"], r=2, modules_to_save=["score", "norm"])
    inject(model, ["v_proj"], r=2)
    model = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    saved = {name for name, _ in saved_modules(model)}
    assert saved == {"score", "model.norm"} | {  # every path that ends in the name, as in PEFT
        f"model.layers.{i}.{name}" for i in (0, 1) for name in ("input_layernorm", "post_attention_layernorm")
    }
    before = model.score.weight.clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
    model(input_ids=IDS, labels=torch.tensor([0, 2])).loss.backward()
    optimizer.step()
    assert not torch.equal(model.score.weight, before)
    disturb(model)
    expected = logits(model)
    merge(model)
    save_adapter(model, tmp_path)
    unmerge(model)
    other = llama()
    load_adapter(other, tmp_path)
    torch.testing.assert_close(logits(other), expected)
    assert "modules_to_save" not in "".join(model.state_dict())
    injected = llama()  # a model that has the branches, and not yet the modules
    inject(injected, ["q_proj", "v_proj"], r=2)
    load_adapter(injected, tmp_path)
    torch.testing.assert_close(logits(injected), expected)


def test_what_the_file_and_the_model_save_whole_must_fit(tmp_path):
    model = llama()
    inject(model, ["q_proj"], r=2, modules_to_save=["score"])
    save_adapter(model, tmp_path / "head")
    plain = llama()
    inject(plain, ["q_proj"], r=2)
    with pytest.warns(UserWarning, match="score"):
        save_adapter(plain, tmp_path / "none")
    with pytest.raises(ValueError, match="missing from the file: score.weight"):
        load_adapter(model, tmp_path / "none")
    with pytest.raises(ValueError, match=r"shapes differ: score.weight: file \[3, 16\], model \[5, 16\]"):
        load_adapter(llama(num_labels=5), tmp_path / "head")
    causal = llama(task="ForCausalLM")
    with pytest.raises(ValueError, match="saved whole, and not in the model: score.weight"):
        load_adapter(causal, tmp_path / "head")
    assert not list(lora_layers(causal))


@pytest.mark.parametrize(
    ("names", "message", "error"),
    [
        (["scores"], "'scores' match no module of LlamaForSequenceClassification, which is made of model, score", None),
        ("score", "must be a list of strings, got 'score'", TypeError),
        ([3], "must be a list of strings", TypeError),
        (["model"], "'q_proj' match no module", None),
    ],
)
def test_names_that_cannot_be_saved(names, message, error):
    model = llama()
    with pytest.raises(error or ValueError, match=message):
        inject(model, ["q_proj"], modules_to_save=names)
    assert not list(lora_layers(model)) and not list(saved_modules(model))
    assert all(p.requires_grad for p in model.parameters())


def test_tied_modules_are_saved_together_or_not_at_all(tmp_path):
    model = llama(task="ForCausalLM", tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"lm_head: it shares a parameter with model.embed_tokens.weight; name both"):
        inject(model, ["q_proj"], modules_to_save=["lm_head"])
    inject(model, ["q_proj"], r=2, modules_to_save=["lm_head", "embed_tokens"])
    disturb(model)
    with pytest.warns(UserWarning, match="lm_head.weight to model.embed_tokens.weight|embed_tokens.weight to lm_head"):
        save_adapter(model, tmp_path)
    other = llama(task="ForCausalLM", tie_word_embeddings=True)
    load_adapter(other, tmp_path)
    torch.testing.assert_close(logits(other), logits(model))
    stock = peft.PeftModel.from_pretrained(llama(task="ForCausalLM", tie_word_embeddings=True), tmp_path).eval()
    torch.testing.assert_close(logits(stock), logits(model))
    untied = llama(task="ForCausalLM", tie_word_embeddings=False)
    inject(untied, ["q_proj"], r=2, modules_to_save=["lm_head", "embed_tokens"])
    save_adapter(disturb(untied), tmp_path)
    with pytest.raises(ValueError, match="are one tensor in the model, and differ in the file"):
        load_adapter(other, tmp_path)


def test_a_branch_and_a_whole_module_exclude_each_other():
    model = llama()
    inject(model, ["q_proj"])
    with pytest.raises(ValueError, match="layers.0.self_attn: it carries a branch already"):
        inject(model, ["up_proj"], modules_to_save=["self_attn"])
    model = llama()
    inject(model, ["up_proj"], modules_to_save=["self_attn"])
    with pytest.raises(ValueError, match="match no module"):
        inject(model, ["k_proj"])


@pytest.mark.parametrize("drawn", [True, False])
@pytest.mark.parametrize("copied", [False, True])
def test_a_newly_drawn_head_that_is_frozen_and_unsaved_is_named(tmp_path, drawn, copied):
    llama(task="ForCausalLM" if drawn else "ForSequenceClassification").save_pretrained(tmp_path / "base")
    model = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    inject(model, ["q_proj", "v_proj"], r=2)
    if copied:
        model = copy.deepcopy(model).to(torch.bfloat16)
    if drawn:
        with pytest.warns(UserWarning, match="frozen, not in the adapter file, .*: score; "):
            save_adapter(model, tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if not drawn:
            save_adapter(model, tmp_path / "a")
        again = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
        inject(again, "all-linear", r=2, modules_to_save=["score"])
        save_adapter(again, tmp_path / "b")


def test_a_newly_drawn_layer_under_a_branch_is_named_too(tmp_path):
    make("Bert", SMALL, "ForMaskedLM").save_pretrained(tmp_path / "base")
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base")
    inject(model, ["dense", "classifier"], r=2)
    with pytest.warns(UserWarning, match="bert.pooler.dense, classifier; "):
        save_adapter(model, tmp_path / "a")


def test_a_model_of_which_nothing_is_known_has_its_head_named(tmp_path):
    model = make("Roberta", ROBERTA, "ForSequenceClassification")
    inject(model, ["query"], r=2)
    with pytest.warns(UserWarning, match="classifier.dense, classifier.out_proj; "):
        save_adapter(model, tmp_path)
    model = llama(task="ForCausalLM")
    inject(model, ["q_proj"], r=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_adapter(model, tmp_path)
