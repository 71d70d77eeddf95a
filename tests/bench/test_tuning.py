"""Tuned configurations: where they are kept, what is ignored, and that the fastest one wins."""

import json
import os
import pwd
import sys
import warnings
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

from fastlora import one_launch, routes, selection
from fastlora.backends import reference, tuning
from fastlora.backends.configs import TILE_TABLES, choose_config, table_for
from fastlora.backends.cuda import quantised_launch as cuda_packed
from fastlora.backends.target import Target
from fastlora.backends.triton import launch as triton_lora
from fastlora.backends.triton import quantised_launch as triton_packed
from fastlora.backends.tuning import Tuned, load_choices, save_choices, shape_class
from fastlora.bench import tuner
from fastlora.bench.cases import LayerCase
from fastlora.bench.timing import HostClock
from fastlora.problem import LaunchSpec, Packed, Sizes

DEVICE = "NVIDIA Imaginary 9000 (test)"
KEY = shape_class("forward", 8192, 4096, 4096, 16, torch.bfloat16, False)
CASE = LayerCase(64, 48, 32, 4, 0.0, "float32")


HOPPER = Target(arch=90, n_sms=132)
DECODING = (cuda_packed, triton_packed)


HEADLINE = LayerCase(8192, 4096, 4096, 16)


def table_config(direction="forward", case=HEADLINE):
    sizes = (case.m, case.n, case.k, case.r)
    size = case.torch_dtype.itemsize
    return choose_config(direction, *sizes, arch=90, n_sms=132, element_size=size, aligned=True)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "cache_directory", lambda: tmp_path / "fastlora")
    tuning.forget_choices()
    yield tmp_path / "fastlora"
    tuning.forget_choices()


def test_shapes_of_one_class_share_a_choice():
    same = shape_class("forward", 5000, 4000, 3000, 9, torch.bfloat16, False)
    assert same == KEY == "forward m8192 n4096 k4096 r16 bfloat16"
    others = [
        shape_class("backward", 8192, 4096, 4096, 16, torch.bfloat16, False),
        shape_class("forward", 8193, 4096, 4096, 16, torch.bfloat16, False),
        shape_class("forward", 8192, 4096, 4096, 17, torch.bfloat16, False),
        shape_class("forward", 8192, 4096, 4096, 16, torch.float16, False),
        shape_class("forward", 8192, 4096, 4096, 16, torch.bfloat16, True),
    ]
    assert len({KEY, *others}) == 6
    assert "m1 " in shape_class("forward", 1, 1, 1, 1, torch.bfloat16, False)
    with pytest.raises(ValueError, match="direction must be one of"):
        shape_class("upward", 1, 1, 1, 1, torch.bfloat16, False)


def choices(**configs):
    """What save_choices takes, by names that are no shape classes but for KEY."""
    return {KEY if name == "KEY" else name: {"backend": None, "config": config} for name, config in configs.items()}


def test_choices_survive_and_add_up():
    first, second = table_config(), replace(table_config(), group_m=3)
    path = save_choices(DEVICE, {KEY: {"backend": "cuda", "config": first, "median_us": 1.5}})
    assert path.name == "tuned-nvidia-imaginary-9000-test.json"
    save_choices(DEVICE, {**choices(another=second), "third": {"backend": "composed", "config": None}})
    assert load_choices(DEVICE) == {
        KEY: Tuned("cuda", first), "another": Tuned(None, second), "third": Tuned("composed", None),
    }  # fmt: skip
    assert json.loads(path.read_text())["choices"][KEY]["median_us"] == 1.5
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_choice_that_no_longer_holds_is_dropped():
    save_choices(DEVICE, choices(KEY=table_config(), another=table_config()))
    save_choices(DEVICE, {}, [KEY, "never there"])
    assert load_choices(DEVICE) == {"another": Tuned(None, table_config())}


def test_shipped_choices_serve_where_the_user_has_none_of_his_own(monkeypatch, tmp_path):
    """They are files of the same command, made with --output."""
    shipped, own = replace(table_config(), group_m=3), replace(table_config(), group_m=5)
    other = shape_class("backward", 8192, 4096, 4096, 16, torch.bfloat16, False)
    kept = {**choices(KEY=shipped), other: {"backend": None, "config": shipped}}
    path = save_choices(DEVICE, kept, directory=tmp_path / "tuned")
    assert path == tmp_path / "tuned" / "tuned-nvidia-imaginary-9000-test.json" and load_choices(DEVICE) == {}
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "tuned")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: DEVICE)
    save_choices(DEVICE, choices(KEY=own))
    gpu, sizes = torch.device("cuda", 0), (8192, 4096, 4096, 16)
    assert tuning.tuned_config("forward", gpu, *sizes, torch.bfloat16, False) == own
    assert tuning.tuned_config("backward", gpu, *sizes, torch.bfloat16, False) == shipped
    assert tuning.tuned_config("backward", gpu, *sizes, torch.float16, False) is None


def test_a_user_without_home_has_no_choices_and_no_error(monkeypatch, cache):
    monkeypatch.undo()  # the real cache directory
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    assert load_choices(DEVICE) == {}


def test_nothing_tuned_is_no_reason_to_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_choices(DEVICE) == {}


def stored(**changes):
    config = asdict(table_config())
    content = {"format": 2, "device": DEVICE, "choices": {KEY: {"backend": "triton", "config": config}}}
    return {**content, **changes}


DAMAGE = {
    "truncated": (json.dumps(stored())[:-20], "not JSON"),
    "empty": ("", "not JSON"),
    "too deep": ("[" * 100_000, "not JSON"),
    "a list": ("[]", "not a file of format 2"),
    "another format": (json.dumps(stored(format=1)), "not a file of format 2"),
    "another device": (json.dumps(stored(device="NVIDIA Other")), "made for 'NVIDIA Other'"),
    "choices of no kind": (json.dumps(stored(choices=[1])), "not a file of format 2"),
    "no choice": (json.dumps(stored(choices={KEY: {}})), "not a choice"),
    "a backend that is none": (
        json.dumps(stored(choices={KEY: {"backend": "cublas", "config": None}})),
        "backend cannot be 'cublas'",
    ),
    "a list of backends": (
        json.dumps(stored(choices={KEY: {"backend": ["cuda"], "config": None}})),
        "backend cannot be",
    ),
    "no configuration": (json.dumps(stored(choices={KEY: {"backend": None, "config": 1}})), "not a configuration"),
    "a missing field": (
        json.dumps(stored(choices={KEY: {"backend": None, "config": {"block_m": 64}}})),
        "not a configuration",
    ),
    "an unknown field": (
        json.dumps(stored(choices={KEY: {"backend": None, "config": {**asdict(table_config()), "run": "rm"}}})),
        "not a configuration",
    ),
    "text for a number": (
        json.dumps(stored(choices={KEY: {"backend": None, "config": {**asdict(table_config()), "block_m": "64"}}})),
        "block_m cannot be '64'",
    ),
    "a negative size": (
        json.dumps(stored(choices={KEY: {"backend": None, "config": {**asdict(table_config()), "block_m": -64}}})),
        "block_m cannot be -64",
    ),
    "a size that no tile has": (
        json.dumps(stored(choices={KEY: {"backend": None, "config": {**asdict(table_config()), "block_n": 96}}})),
        "block_n cannot be 96",
    ),
    "a huge size": (
        json.dumps(stored(choices={KEY: {"backend": None, "config": {**asdict(table_config()), "num_stages": 10**9}}})),
        "num_stages cannot be",
    ),
    "true for one": (
        json.dumps(stored(choices={KEY: {"backend": None, "config": {**asdict(table_config()), "group_m": True}}})),
        "group_m cannot be True",
    ),
    "a number for true": (
        json.dumps(stored(choices={KEY: {"backend": None, "config": {**asdict(table_config()), "fused": 1}}})),
        "fused cannot be 1",
    ),
    "a way of a backend that decodes nothing": (
        json.dumps(stored(choices={KEY: {"backend": None, "config": None, "in_loop": {"composed": True}}})),
        "in_loop cannot be {'composed': True}",
    ),
    "a way that is none": (
        json.dumps(stored(choices={KEY: {"backend": None, "config": None, "in_loop": {"cuda": 1}}})),
        "in_loop cannot be {'cuda': 1}",
    ),
    "one way for all": (
        json.dumps(stored(choices={KEY: {"backend": None, "config": None, "in_loop": True}})),
        "in_loop cannot be True",
    ),
    "NaN": (
        json.dumps(
            stored(choices={KEY: {"backend": None, "config": {**asdict(table_config()), "group_m": float("nan")}}})
        ),
        "cannot be nan",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_ignored_with_a_warning_and_replaced_by_the_next_tuning(damage, cache):
    text, reason = DAMAGE[damage]
    path = tuning.cache_file(DEVICE)
    cache.mkdir()
    path.write_text(text)
    with pytest.warns(UserWarning, match="ignoring .*run `fastlora tune`") as caught:
        assert load_choices(DEVICE) == {}
    assert reason in str(caught[0].message)
    save_choices(DEVICE, choices(KEY=table_config()))
    assert load_choices(DEVICE) == {KEY: Tuned(None, table_config())}


def test_binary_rubbish_is_ignored_with_a_warning(cache):
    cache.mkdir()
    tuning.cache_file(DEVICE).write_bytes(bytes(range(256)))
    with pytest.warns(UserWarning, match="ignoring"):
        assert load_choices(DEVICE) == {}
    save_choices(DEVICE, choices(KEY=table_config()))
    assert load_choices(DEVICE) == {KEY: Tuned(None, table_config())}


def test_a_failed_write_leaves_the_old_file(monkeypatch):
    path = save_choices(DEVICE, choices(KEY=table_config()))
    before = path.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_choices(DEVICE, choices(another=table_config()))
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_call_gets_its_class_choice_or_none(monkeypatch):
    chosen = replace(table_config(), group_m=3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: DEVICE)
    device = torch.device("cuda", 0)
    assert tuning.tuned_config("forward", device, 8192, 4096, 4096, 16, torch.bfloat16, False) is None
    save_choices(DEVICE, choices(KEY=chosen))  # also forgets what was read
    assert tuning.tuned_config("forward", device, 7000, 4096, 4096, 12, torch.bfloat16, False) == chosen
    assert tuning.tuned_config("forward", device, 16, 4096, 4096, 16, torch.bfloat16, False) is None
    cpu = torch.device("cpu")
    assert tuning.tuned_config("forward", cpu, 8192, 4096, 4096, 16, torch.bfloat16, False) is None


def packed_spec(**changes):
    """A forward's of 64 rows over nf4."""
    dtype, codes = torch.bfloat16, (torch.uint8, torch.float32)
    packed = Packed((64, 0), codes, (4096 * 4096 // 2, 4096 * 64), (True, True), True)
    sizes = Sizes(64, 4096, 4096, 16)
    spec = LaunchSpec("forward", sizes, dtype, (dtype, dtype), torch.device("cuda", 0), "nf4", packed=packed)
    return spec._replace(**changes)


def test_a_packed_weights_class_is_its_own(monkeypatch):
    """The way to decode by backend; the configuration for Triton's way alone; nothing of another format, of dense
    weights, or of rows that are not aligned."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: DEVICE)
    spec, chosen = packed_spec(), replace(table_config(), group_m=3)
    key = shape_class("forward", *spec.sizes, spec.dtype, False, "nf4")
    assert key == "forward m64 n4096 k4096 r16 bfloat16 nf4"
    save_choices(DEVICE, {key: {"backend": "triton", "config": chosen, "in_loop": {"cuda": False, "triton": True}}})
    assert tuning.tuned_in_loop("cuda", spec) is False and tuning.tuned_in_loop("triton", spec) is True
    assert tuning.tuned_way(spec, True) == chosen and tuning.tuned_way(spec, False) is None
    assert tuning.tuned_backend(spec) == "triton"
    others = (
        spec._replace(base_format="fp4"), spec._replace(packed=None, base_format="dense"),
        spec._replace(aligned=spec.aligned._replace(act=False)), spec._replace(device=torch.device("cpu")),
    )  # fmt: skip
    for other in others:
        assert (
            tuning.tuned_in_loop("triton", other)
            is tuning.tuned_way(other, True)
            is tuning.tuned_backend(other)
            is None
        )


def test_both_backends_launch_the_way_that_was_tuned(monkeypatch):
    """Few rows once, many in the loop; but not where that is impossible."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: DEVICE)
    few, many = packed_spec(), packed_spec(sizes=Sizes(512, 4096, 4096, 16))
    assert [each.decodes_in_loop(spec) for each in DECODING for spec in (few, many)] == [True, False] * 2
    for spec, in_loop in ((few, False), (many, True)):
        ways = {"cuda": in_loop, "triton": in_loop}
        key = shape_class("forward", *spec.sizes, spec.dtype, False, "nf4")
        save_choices(DEVICE, {key: {"backend": None, "config": None, "in_loop": ways}})
    assert [each.decodes_in_loop(spec) for each in DECODING for spec in (few, many)] == [False, True] * 2
    assert [each.decodes_in_loop(few, tuned=False) for each in DECODING] == [True, True]
    assert not any(each.decodes_in_loop(many._replace(dropout=True)) for each in DECODING)


def test_the_backend_that_was_tuned_comes_first_over_a_packed_weight(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: DEVICE)
    refused = {"cuda": None, "triton": None}
    monkeypatch.setattr(selection, "why_unsupported", lambda name, spec: refused[name])
    monkeypatch.setattr(
        selection, "serving_module", lambda name, spec: SimpleNamespace(prepare=lambda spec: lambda given: name)
    )
    spec = packed_spec()

    def serving(requested=None) -> str:
        routes.forget_routes()
        return one_launch.in_one_launch((1,), requested, ("a key",), lambda: ((1,), spec))()

    assert one_launch.served_in_launch(spec, None) and serving() == "cuda"
    key = shape_class("forward", *spec.sizes, spec.dtype, False, "nf4")
    save_choices(DEVICE, {key: {"backend": "triton", "config": None, "in_loop": {"triton": True}}})
    assert serving() == "triton" and serving("cuda") == "cuda"
    refused["triton"] = "triton: not here"
    assert serving() == "cuda"
    routes.forget_routes()


def test_triton_takes_the_tile_that_was_tuned_for_its_way(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: DEVICE)
    monkeypatch.setattr(triton_packed, "target_of", lambda device: HOPPER)
    spec, chosen = packed_spec(), replace(table_config(), block_m=64, group_m=3, fused=False)
    key = shape_class("forward", *spec.sizes, spec.dtype, False, "nf4")
    save_choices(DEVICE, {key: {"backend": None, "config": chosen, "in_loop": {"triton": False}}})
    assert triton_packed.prepare(spec).config == chosen
    assert triton_packed.prepare(spec, in_loop=True).config != chosen
    odd = packed_spec(sizes=Sizes(64, 4088, 4096, 16))
    assert triton_packed.prepare(odd).config != chosen, "rows that Triton does not know to be aligned"


@pytest.mark.parametrize("direction, dropout", [("forward", False), ("backward", True)])
def test_the_kernels_take_the_users_choice(monkeypatch, direction, dropout):
    asked, chosen = [], replace(table_config(), group_m=3)
    monkeypatch.setattr(triton_lora, "tuned_config", lambda *what: asked.append(what) or chosen)
    sizes, dtype = Sizes(8192, 4096, 4096, 16), torch.bfloat16
    spec = LaunchSpec(direction, sizes, dtype, (dtype, dtype), torch.device("cpu"), dropout=dropout)
    assert triton_lora.choose_tile(spec, HOPPER) == chosen
    assert asked == [(direction, spec.device, *sizes, dtype, dropout)]
    odd = spec._replace(aligned=spec.aligned._replace(act=False))
    assert triton_lora.choose_tile(odd, HOPPER) != chosen and len(asked) == 1


class FakeBackend:
    """A backend whose launches take a time that is a function of the configuration, on a clock of its own; the
    ``wrong`` ones halve the scaling."""

    def __init__(self, seconds, wrong=()):
        self.seconds, self.wrong, self.now, self.launched = seconds, wrong, 0.0, []

    def prepare(self, spec, config=None):
        right = reference.prepare(spec)

        def launch(operands):
            if spec.direction == "backward":
                assert tuple(spec.needs) == (True, True, True, False)
                assert operands.s.shape == (operands.x.shape[0], operands.lora_a.shape[0])
            if config is not None:
                self._run(spec.direction, config)
            return right(operands._replace(scaling=operands.scaling * (0.5 if config in self.wrong else 1.0)))

        return launch

    def _run(self, direction, config):
        self.launched.append((direction, config))
        self.now += self.seconds(config)

    def clock(self):
        backend = self

        class Clock(HostClock):
            def mark(self):
                return backend.now

        return Clock()


def tune(seconds, direction="forward", budget=1e9, wrong=(), case=CASE):
    backend = FakeBackend(seconds, wrong)
    return tuner.tune_case(case, direction, HOPPER, backend, budget, backend.clock()), backend


def tiles():
    return TILE_TABLES[table_for(90, CASE.r, 4, True)]


@pytest.mark.parametrize("direction", tuning.DIRECTIONS)
def test_the_fastest_of_the_table_and_what_is_around_it_wins(direction):
    slow, fast = tiles()[0], tiles()[-1]
    wanted = replace(fast, group_m=16)
    times = {slow: 4.0, fast: 2.0, wanted: 1.0}
    choice, launchers = tune(lambda config: times.get(config, 3.0), direction)
    table = table_config(direction, CASE)
    assert choice.best.config == wanted
    assert choice.gain == pytest.approx(1 - 1.0 / times.get(table, 3.0))
    assert choice.failed == 0 and choice.tried == len({config for _, config in launchers.launched})
    assert {which for which, _ in launchers.launched} == {direction}


def test_a_gain_within_the_noise_changes_nothing():
    table = table_config(case=CASE)
    choice, _ = tune(lambda config: 1.0 if config == table else 0.99)
    assert choice.best == choice.table and choice.best.config == table and choice.gain == 0
    choice, _ = tune(lambda config: 1.0 if config == table else 0.9)
    assert choice.best.config != table


def test_configurations_that_do_not_run_are_counted_and_passed_over():
    table = table_config(case=CASE)

    def seconds(config):
        if config != table:
            raise RuntimeError("out of resource: shared memory")
        return 1.0

    choice, _ = tune(seconds)
    assert choice.failed == choice.tried - 1 > 5 and choice.best == choice.table


@pytest.mark.parametrize("direction", tuning.DIRECTIONS)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_fastest_configuration_is_not_chosen_where_its_results_are_wrong(direction, dropout):
    fast = next(config for config in tiles() if config != table_config(direction, CASE))
    case = replace(CASE, dropout=dropout)
    choice, _ = tune(lambda config: 1.0 if config == fast else 3.0, direction, wrong=(fast,), case=case)
    assert choice.failed == 1 and choice.best.config != fast


def test_a_table_choice_that_does_not_run_is_an_error():
    def fail(config):
        raise RuntimeError("no such instruction")

    with pytest.raises(RuntimeError, match="table's choice .* does not run: RuntimeError: no such instruction"):
        tune(fail)


def test_the_search_stops_when_its_time_is_up():
    choice, _ = tune(lambda config: 1.0, budget=0.0)
    assert choice.tried == 1


def test_neighbours_differ_in_one_field():
    base = tiles()[0]
    for other in tuner.around(base):
        assert sum(a != b for a, b in zip(asdict(base).values(), asdict(other).values(), strict=True)) == 1
