import json
from dataclasses import asdict, fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_lth.program.config import RunConfig, SettingError
from sparse_lth.program.models import MODELS

NAMES = [field.name for field in fields(RunConfig)]
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(10**30)
) | st.sampled_from(["auto", "cpu", "1ep", "٣it", "lenet-5", "global", "a\0b", "\ud800"])
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@settings(max_examples=500, deadline=None)
@given(st.dictionaries(st.sampled_from(NAMES), JSON, max_size=3) | JSON)
def test_whatever_json_it_gets_is_a_run_or_one_kind_of_error(given_settings):
    try:
        config = RunConfig.from_dict(given_settings)
    except SettingError:
        return
    assert RunConfig.from_dict(json.loads(json.dumps(asdict(config)))) == config
    search = config.search(MODELS[config.model].fresh())
    assert all(0 < density <= 1 for density in search.schedule[-1].values())


WRONG = {
    "seed": [0.0, True, "0", None, -1, 2**63, [0]],
    "bs": [1.0, True, 0, 10**30, None],
    "epochs": [True, 0, 10**9 + 1],
    "iterations": [1.5, 0, False],
    "prune_rounds": [10**400, 10**9, 0],
    "lr": [True, "1", 10**400, float("inf"), float("nan"), 0],
    "prune_pc": [0, 1, True, 1e-30, 1 - 1e-9],
    "reinit": [0, 1, [True], "yes", None],
    "model": [[], {}, 3, "vgg"],
    "device": ["cuda:7", "tpu", None],
    "rewind": ["1", "1epoch", "-1it", "9" * 5000 + "it", 3],
    "block_lasso": [-1.0, float("nan"), "1", True, None],
    "last_lr": ["falling", None],
    "data_dir": ["a\0b", "\udcff", 3],
    "blocksize": [[16], [16, 16, 16], [16.0, 16], [True, 1], [10**30, 1], [0, 1], 16, None],
    "export_blocksize": [[999, 999], [300, 784], [100000, 2], [1, 785], [0, 1], [4]],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, vs in WRONG.items() for v in vs])
def test_a_wrong_setting_is_refused_by_name(name, value):
    with pytest.raises(SettingError, match=f"^{name}: expected ") as error:
        RunConfig.from_dict({name: value})
    assert len(str(error.value)) < 300


def test_settings_of_no_run_are_refused():
    for other in ([], None, 3, {"speed": 1}, [[[[[[[[[]]]]]]]]], {"lr": 1.0, 3: 4}):
        with pytest.raises(SettingError, match="expected the settings of a run"):
            RunConfig.from_dict(other)


def test_one_pruned_block_in_global_scope_is_enough_and_one_left_too():
    blocks = 266_200
    RunConfig(scope="global", prune_pc=1 / blocks, prune_rounds=1)
    RunConfig(scope="global", prune_pc=1 - 1 / blocks, prune_rounds=1)
    for prune_pc in (0.4 / blocks, 1 - 0.4 / blocks):
        with pytest.raises(SettingError, match=f"one of the {blocks} blocks"):
            RunConfig(scope="global", prune_pc=prune_pc, prune_rounds=1)


@pytest.mark.parametrize("steps", ["0it", "10it"])
def test_a_rewind_step_within_the_round_is_accepted(steps):
    RunConfig(dataset="digits", epochs=1, rewind=steps).rewind_step(1350)


@pytest.mark.parametrize("steps", ["11it", "1ep", "2ep"])
def test_a_rewind_step_beyond_the_round_is_refused(steps):
    config = RunConfig(dataset="digits", epochs=1, rewind=steps)
    with pytest.raises(SettingError, match=r"rewind: .* before the end of a round, 11 st"):
        config.rewind_step(1350)


@pytest.mark.parametrize(
    ("images", "bs", "steps", "every"),
    [(55_000, 128, 8 * 430, 430), (1350, 128, 182 * 11, 23 * 11), (10, 128, 2000, 250)],
)
def test_a_round_whose_length_is_not_given_has_2000_steps_at_least(images, bs, steps, every):
    config = RunConfig(bs=bs)
    assert (config.steps(images), config.steps_between(images)) == (steps, every)
    per_epoch = config.per_epoch(images)
    three = RunConfig(bs=bs, epochs=3)
    assert (three.steps(images), three.steps_between(images)) == (3 * per_epoch, per_epoch)
    assert RunConfig(iterations=7, every=2).steps(images) == 7
