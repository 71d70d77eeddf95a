"""What transformers writes of merged and unmerged models is plain, or says that it is not."""

import copy
import warnings

import pytest
import torch
from safetensors.torch import load_file

import fastlora
from fastlora.model import inject, merge, merge_and_unload, unmerge
from tests.support.merge_models import close, logits, make_llama, start_branches, trained_llama


@pytest.fixture
def quiet(capfd):
    """Loads a model and asserts that neither a warning nor a report was printed."""
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()

    def reload(directory):
        transformers.utils.logging.set_verbosity_warning()
        capfd.readouterr()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model, report = transformers.AutoModelForCausalLM.from_pretrained(
                directory, output_loading_info=True, local_files_only=True, dtype=torch.float64
            )
        streams = capfd.readouterr()
        assert not any(report.values()) and not streams.out and not streams.err, (report, streams)
        return model.eval()

    return reload


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shards", [None, "2KB"])
def test_an_unloaded_model_reloads_without_a_word(tmp_path, quiet, tied, shards):
    model = trained_llama(tie_word_embeddings=tied)
    expected = logits(model)
    keys = make_llama(tie_word_embeddings=tied).state_dict().keys()
    model = merge_and_unload(model)
    assert model.state_dict().keys() == keys
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path, **({} if shards is None else {"max_shard_size": shards}))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards is not None)
    close(logits(quiet(tmp_path)), expected)
    assert (logits(make_llama(tie_word_embeddings=tied)) - expected).abs().max() > 0.01


def test_a_merged_model_is_written_plain(tmp_path, quiet):
    model = trained_llama()
    expected = logits(model)
    merge(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == make_llama().state_dict().keys()
    close(logits(quiet(tmp_path)), expected)
    assert len([k for k in model.state_dict() if k.endswith(".merged")]) == 4  # only there
    unmerge(model)
    assert torch.equal(logits(model), expected)


def save_by_method(model, path):
    model.save_pretrained(path)


def save_by_accelerate(model, path):
    pytest.importorskip("accelerate").Accelerator(cpu=True).save_model(model, path)


def save_the_part(model, path):
    """LoRA went into a part of the model; the whole is saved."""
    plain = make_llama()
    plain.model = model.model
    plain.save_pretrained(path)


def save_a_copy(model, path):
    copy.deepcopy(model).save_pretrained(path)


@pytest.mark.parametrize("save", [save_by_method, save_by_accelerate, save_the_part, save_a_copy])
def test_an_unmerged_model_says_so_when_it_is_saved(tmp_path, save):
    model = trained_llama()
    expected = logits(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        save(model, tmp_path)
    ours = [str(w.message) for w in caught if "unmerged" in str(w.message)]
    assert len(ours) == 1
    for word in ("from_pretrained", "fastlora.merge_and_unload(model)", "fastlora.save_adapter(model", "inject"):
        assert word in ours[0]
    again = make_llama()  # the third of the ways that the message names
    inject(again, ["q_proj", "down_proj"], r=3, alpha=5)
    again.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert torch.equal(logits(again), expected)


def test_the_warning_names_the_line_that_saves(tmp_path):
    model = trained_llama()
    with pytest.warns(UserWarning, match="unmerged") as caught:
        model.save_pretrained(tmp_path)
    ours = next(w for w in caught if "unmerged" in str(w.message))
    assert ours.filename == __file__


def test_state_dicts_for_other_uses_do_not_warn(tmp_path):
    def save_model(model):  # a function of that name which is none of the libraries'
        torch.save(model.state_dict(), tmp_path / "state.pt")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_model(trained_llama())
        copy.deepcopy(trained_llama())
        fastlora.save_adapter(trained_llama(), tmp_path / "adapter")
        make_llama().save_pretrained(tmp_path / "plain")


def test_an_offloaded_merged_model_is_written_plain(tmp_path, quiet):
    accelerate = pytest.importorskip("accelerate")
    model = trained_llama()
    expected = logits(model)
    devices = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "disk", "model.norm": "cpu"}
    devices |= {"model.rotary_emb": "cpu", "lm_head": "disk"}
    model = accelerate.dispatch_model(model, devices, main_device="cpu", offload_dir=str(tmp_path / "offload"))
    assert model.model.layers[0].mlp.down_proj.weight.is_meta
    merge(model)
    close(logits(model), expected)
    with pytest.warns(UserWarning, match="offloaded modules"):  # transformers' own
        model.save_pretrained(tmp_path / "merged")
    close(logits(quiet(tmp_path / "merged")), expected)
    merge_and_unload(model)
    close(logits(model), expected)
    with pytest.warns(UserWarning, match="offloaded modules"):
        model.save_pretrained(tmp_path / "unloaded")
    close(logits(quiet(tmp_path / "unloaded")), expected)


def trainer(model, path, steps):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    options = {
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "save_steps": 2,
        "lr_scheduler_type": "constant",
    }
    arguments = transformers.TrainingArguments(
        output_dir=str(path), max_steps=steps, report_to=[], use_cpu=True, disable_tqdm=True, **options
    )
    rows = torch.randint(0, 19, (24, 8), generator=torch.Generator().manual_seed(5))
    return transformers.Trainer(
        model=model, args=arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows]
    )


def test_trainer_resumes_what_it_has_written(tmp_path):
    model = trained_llama()
    with pytest.warns(UserWarning, match="saved with its LoRA layers unmerged"):
        trainer(model, tmp_path / "whole", 4).train()
    again = trained_llama()
    start_branches(again, seed=7)
    trainer(again, tmp_path / "resumed", 4).train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(logits(again), logits(model)) and not torch.equal(logits(model), logits(trained_llama()))
    fresh = make_llama()
    inject(fresh, ["q_proj", "down_proj"], r=3, alpha=5)
    fresh.load_state_dict(load_file(tmp_path / "whole" / "checkpoint-4" / "model.safetensors"), strict=False)
    assert torch.equal(logits(fresh), logits(model))
    merge_and_unload(model).save_pretrained(tmp_path / "plain")
    close(logits(type(model).from_pretrained(tmp_path / "plain", dtype=torch.float64).eval()), logits(again))
