"""Settings are read from the plans, and every mistake names the key, the value and what is allowed."""

from __future__ import annotations

import dataclasses

import pytest
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl.errors import UserError
from nnunet_ssl.methods.crossmatch import CrossMatchSettings
from nnunet_ssl.settings import SemiSupervisedSettings


def test_defaults_are_the_papers():
    s = CrossMatchSettings.from_plans({})
    assert (s.confidence_threshold, s.self_distillation, s.weak_dropout, s.strong_dropout) == (0.85, 0.3, 0.25, 0.75)
    assert (s.cutmix_probability, s.cutmix_min_volume, s.cutmix_max_volume) == (0.5, 0.02, 0.4)
    assert s.cutmix_aspect_ratio == 0.3 and s.ramp_length == 0.3


def test_inheritance_of_configurations_reaches_the_settings():
    plans = {
        "configurations": {
            "parent": {"semi_supervised": {"ramp_length": 0.0}},
            "child": {"inherits_from": "parent", "architecture": {}},
        }
    }
    configuration = PlansManager(plans).get_configuration("child").configuration
    assert CrossMatchSettings.from_plans(configuration).ramp_length == 0.0


@pytest.mark.parametrize(
    "given, words",
    [
        ({"tau": 0.9}, ["'tau'", "confidence_threshold"]),
        ({"confidence_threshold": 1.5}, ["confidence_threshold", "1.5", "from 0 to 1"]),
        ({"confidence_threshold": "0.9"}, ["confidence_threshold", "'0.9'", "a number"]),
        ({"confidence_threshold": True}, ["confidence_threshold", "True"]),
        ({"ramp_length": float("nan")}, ["ramp_length", "nan"]),
        ({"unlabeled_batch_size": 1}, ["unlabeled_batch_size", "1", "at least 2", "null"]),
        ({"unlabeled_batch_size": 2.5}, ["unlabeled_batch_size", "2.5", "a whole number"]),
        ({"memory_mode": "fast"}, ["memory_mode", "'fast'", "'stacked'"]),
        ({"allow_transductive": 1}, ["allow_transductive", "1", "True"]),
        ({"cutmix_min_volume": 0.5}, ["cutmix_min_volume", "0.5", "cutmix_max_volume", "0.4"]),
        ({"seed": 10**400}, ["seed", "a whole number"]),
        ([], ["semi_supervised", "[]"]),
        ({"ramp_length": 7, "memory_mode": "fast"}, ["'ramp_length'", "7", "'memory_mode'", "'fast'"]),
        ({"ramp_lenght": 0.2, "memory_mode": "fast"}, ["'ramp_lenght'", "'memory_mode'", "'fast'"]),
        ({"ramp_lenght": 0.2, "memorymode": 1}, ["Did you mean memory_mode, ramp_length?"]),
    ],
)
def test_mistakes_are_named(given, words):
    with pytest.raises(UserError) as error:
        CrossMatchSettings.from_plans({"semi_supervised": given})
    for word in words:
        assert word in str(error.value)


def test_settings_are_frozen_and_plain():
    s = SemiSupervisedSettings.from_plans({"semi_supervised": {"unlabeled_batch_size": 4}})
    with pytest.raises(dataclasses.FrozenInstanceError):
        s.ramp_length = 0.1
    assert s.as_dict()["unlabeled_batch_size"] == 4


def test_every_setting_has_a_help_text():
    assert all(option.metadata["help"] for option in dataclasses.fields(CrossMatchSettings))


@pytest.mark.parametrize("name", ["semisupervised", "semi-supervised", "Semi_supervised", "semi_supervized"])
def test_settings_under_another_name_or_in_another_place_are_not_passed_over(name):
    with pytest.raises(UserError, match=f"entry '{name}', which nothing reads. Did you mean 'semi_supervised'"):
        CrossMatchSettings.from_plans({"batch_size": 2, name: {"ramp_length": 0.0}})
    plans = {"configurations": {}, "plans_name": "nnUNetPlans", "semi_supervised": {"ramp_length": 0.0}}
    with pytest.raises(UserError, match="outside of the configurations, where nothing reads it"):
        CrossMatchSettings.from_plans({}, plans)
    with pytest.raises(UserError, match="'semi_supervised' as a configuration, where nothing reads it"):
        CrossMatchSettings.from_plans({}, {"configurations": {"semi_supervised": {"ramp_length": 0.0}}})
    with pytest.raises(UserError, match="setting 'ramp_length' outside of 'semi_supervised', where nothing reads it"):
        CrossMatchSettings.from_plans({"batch_size": 2, "ramp_length": 0.0})
