"""A method's settings: a frozen dataclass, read from the plans, validated, with the paper's values as defaults.

nnU-Net's trainers take no arguments of their own, and its way to change a training is a configuration in the plans.
So settings are read from the key ``semi_supervised`` of the configuration that is trained::

    "configurations": {
        "3d_fullres_no_ramp": {
            "inherits_from": "3d_fullres",
            "semi_supervised": {"ramp_length": 0.0}
        }
    }

and ``nnUNetv2_train DatasetXXX 3d_fullres_no_ramp 0 -tr CrossMatchTrainer`` trains with them.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Collection, Mapping
from dataclasses import Field, dataclass, field
from typing import Any, TypeVar

from nnunet_ssl.errors import MethodError, UserError
from nnunet_ssl.text import closest, did_you_mean

PLANS_KEY = "semi_supervised"

Settings = TypeVar("Settings", bound="SemiSupervisedSettings")


def setting(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: tuple[Any, ...] | None = None,
    integer: bool = False,
    optional: bool = False,
) -> Any:
    """A dataclass field with its allowed values. Bounds are inclusive; ``optional`` also allows ``None``.

    >>> @dataclass(frozen=True)
    ... class ConsistencySettings(SemiSupervisedSettings):
    ...     weight: float = setting(1.0, "weight of a term", minimum=0.0)
    >>> ConsistencySettings.from_plans({"semi_supervised": {"weight": -1}})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    nnunet_ssl.errors.UserError: The setting 'weight' in the plans' 'semi_supervised' is -1; allowed is a number of ...
    """
    metadata = {
        "help": help,
        "minimum": minimum,
        "maximum": maximum,
        "choices": choices,
        "integer": integer,
        "optional": optional,
    }
    return field(default=default, metadata=metadata)


def ramp_length_setting(default: float) -> Any:
    """The setting ``ramp_length``; a method whose paper has another length than the base gives its own default.

    >>> @dataclass(frozen=True)
    ... class LongRampSettings(SemiSupervisedSettings):
    ...     ramp_length: float = ramp_length_setting(0.8)
    >>> LongRampSettings().ramp_length
    0.8
    """
    return setting(
        default,
        "fraction of the training over which the unsupervised weight rises; 0: full weight from the first step",
        minimum=0.0,
        maximum=1.0,
    )


def allowed_values(option: dataclasses.Field[Any]) -> str:
    """What a setting may be, in words.

    >>> [allowed_values(one) for one in dataclasses.fields(SemiSupervisedSettings)][:2]
    ['whole number, at least 2, or null', 'number, 0 to 1']
    """
    allowed = option.metadata
    if allowed["choices"] is not None:
        return ", ".join(map(json.dumps, allowed["choices"]))
    kind = "whole number" if allowed["integer"] else "number"
    low, high = allowed["minimum"], allowed["maximum"]
    if low is not None:
        kind += f", at least {low:g}" if high is None else f", {low:g} to {high:g}"
    elif high is not None:
        kind += f", at most {high:g}"
    return kind + (", or null" if allowed["optional"] else "")


@dataclass(frozen=True)
class SemiSupervisedSettings:
    """Settings that every method has. A method's own settings derive from this class.

    Raises:
        UserError: a value is out of its range; the text names the setting, the value and what is allowed.
        MethodError: the class is no dataclass, or one of its fields is no :func:`setting`, has a default that is not
            allowed, or changes the meaning of a name of a class that it derives from.

    >>> SemiSupervisedSettings.from_plans({"batch_size": 2, "semi_supervised": {"ramp_length": 0.0}}).ramp_length
    0.0
    """

    unlabeled_batch_size: int | None = setting(
        None,
        "unlabeled patches per step; null: the plan's batch size, at least 2",
        minimum=2,
        integer=True,
        optional=True,
    )
    foreground_crops: float = setting(
        0.33,
        "share of the unlabeled patches that are centered where the network predicts a rare class (present in under a "
        "third of randomly cropped labeled patches); 0 disables this",
        minimum=0.0,
        maximum=1.0,
    )
    ramp_length: float = ramp_length_setting(0.3)
    memory_mode: str = setting(
        "auto",
        "stacked: all streams in one pass; split: one stream at a time, less memory; auto: split on a CPU and, with "
        "batch normalization, on several GPUs (SyncBatchNorm); else stacked, and split if the memory does not suffice",
        choices=("auto", "stacked", "split"),
    )
    activation_checkpointing: bool = setting(
        False,
        "compute activations again for the backward pass instead of keeping them: less memory, more time, the same "
        "gradients",
        choices=(True, False),
    )
    allow_transductive: bool = setting(
        False,
        "allow validation cases among the unlabeled cases; their validation scores are then optimistic",
        choices=(True, False),
    )
    seed: int | None = setting(
        None,
        "seed of weights, batches, masks and noise; null: a new one each time. On a CPU with one worker "
        "(nnUNet_n_proc_DA=1 or 0) the same seed gives the same training",
        minimum=0,
        integer=True,
        optional=True,
    )

    def __post_init__(self) -> None:
        _check_class(type(self))
        problems = [_problem(option, getattr(self, option.name)) for option in dataclasses.fields(self)]
        if any(problems):
            raise UserError(" ".join(filter(None, problems)))

    @classmethod
    def from_plans(
        cls: type[Settings], configuration: Mapping[str, Any], plans: Mapping[str, Any] | None = None
    ) -> Settings:
        """Read the settings of one configuration.

        Args:
            configuration: of the plans, resolved (``inherits_from`` already applied).
            plans: that it comes from, to look for settings in a wrong place.

        Raises:
            UserError: the entry is no table, has keys this method does not know, or values out of range, and the text
                names all of them; or the entry has another name or is in another place, where nothing reads it.
        """
        known = {option.name for option in dataclasses.fields(cls)}
        _check_place(configuration, plans or {}, known)
        given = configuration.get(PLANS_KEY, {})
        if not isinstance(given, Mapping):
            raise UserError(
                f"The plans' '{PLANS_KEY}' must be a table of settings such as {{\"ramp_length\": 0.3}}, "
                f"found {given!r}. Edit the configuration in the plans file in nnUNet_preprocessed."
            )
        unknown = sorted(set(given) - known)
        problems = []
        if unknown:
            problems.append(
                f"The plans' '{PLANS_KEY}' contains {', '.join(map(repr, unknown))}, which {cls.__name__} does not "
                f"know.{did_you_mean(unknown, known)} Known settings: {', '.join(sorted(known))}."
            )
        try:
            settings = cls(**{name: value for name, value in given.items() if name in known})
        except UserError as error:
            problems.append(str(error))
        if problems:
            raise UserError(" ".join(problems))
        return settings

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain values, for logs and checkpoints."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class TeacherSettings(SemiSupervisedSettings):
    """Settings of every method with a teacher that follows the student as a moving average.

    >>> TeacherSettings(predict_with="teacher").ema_decay
    0.99
    """

    ema_decay: float = setting(0.99, "largest decay of the teacher's moving average", minimum=0.0, maximum=1.0)
    predict_with: str = setting(
        "student",
        "whose weights are saved as network_weights, and used for validation and prediction",
        choices=("student", "teacher"),
    )
    validate_both: bool = setting(
        False,
        "after the training, also validate the one of student and teacher that is not used for prediction, into "
        "validation_student or validation_teacher",
        choices=(True, False),
    )


@dataclass(frozen=True)
class CutMixSettings(SemiSupervisedSettings):
    """Settings of every method that pastes CutMix boxes into its strong views.

    Raises:
        UserError: the largest box is smaller than the smallest.

    >>> CutMixSettings(cutmix_min_volume=0.5)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    nnunet_ssl.errors.UserError: The setting 'cutmix_min_volume' in the plans' 'semi_supervised' is 0.5; it must not ...
    """

    cutmix_probability: float = setting(0.5, "share of strong views with a CutMix box", minimum=0.0, maximum=1.0)
    cutmix_min_volume: float = setting(0.02, "smallest share of the patch in a box", minimum=0.001, maximum=0.9)
    cutmix_max_volume: float = setting(0.4, "largest share of the patch in a box", minimum=0.001, maximum=0.9)
    cutmix_aspect_ratio: float = setting(0.3, "smallest ratio between two sides of a box", minimum=0.05, maximum=1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cutmix_min_volume > self.cutmix_max_volume:
            raise UserError(
                f"The setting 'cutmix_min_volume' in the plans' 'semi_supervised' is {self.cutmix_min_volume!r}; it "
                f"must not be above 'cutmix_max_volume', which is {self.cutmix_max_volume!r}."
            )


def teacher_settings(settings: SemiSupervisedSettings) -> TeacherSettings:
    """The settings of a method with a teacher.

    Raises:
        MethodError: they do not say how it moves.
    """
    if isinstance(settings, TeacherSettings):
        return settings
    raise MethodError(
        f"The network has a teacher: derive {type(settings).__name__} from TeacherSettings, which say how it moves."
    )


def predicts_with_teacher(settings: SemiSupervisedSettings, *, has_teacher: bool) -> bool:
    """Whether a method's teacher is the network that predicts.

    Raises:
        MethodError: there is a teacher and no settings of one, or the other way round.
    """
    if has_teacher:
        return teacher_settings(settings).predict_with == "teacher"
    if isinstance(settings, TeacherSettings):
        raise MethodError(
            f"{type(settings).__name__} derives from TeacherSettings, but the network has no teacher: write "
            "TrainingNetwork(network, teacher=True) in build_training_network(), or derive it from "
            "SemiSupervisedSettings."
        )
    return False


def _check_class(settings_class: type[SemiSupervisedSettings]) -> None:
    """Whether the author of a method has written the settings as dataclass and :func:`setting` need them."""
    name = settings_class.__name__
    # A dataclass puts the default in the place of its fields.
    left = [key for one in settings_class.__mro__ for key, value in vars(one).items() if isinstance(value, Field)]
    if left:
        raise MethodError(f"{name} is no dataclass: write @dataclass(frozen=True) above the class.")
    options = dataclasses.fields(settings_class)
    plain = [option.name for option in options if "choices" not in option.metadata]
    if plain:
        raise MethodError(
            f"The field {plain[0]!r} of {name} does not say which values are allowed. Write {plain[0]}: float = "
            "setting(default, help, minimum=...)."
        )
    for option in options:
        _check_option(settings_class, option)


def _check_option(settings_class: type[SemiSupervisedSettings], option: Field[Any]) -> None:
    name, written = settings_class.__name__, getattr(settings_class, option.name)
    if written is not option.default:
        raise MethodError(
            f"{name} has {option.name} = {written!r} without a type, which a dataclass does not read: the default "
            f"stays {option.default!r}. Write {option.name}: float = setting({written!r}, help, ...)."
        )
    if _problem(option, written):
        raise MethodError(
            f"The default of the setting {option.name!r} of {name} is {written!r}; allowed is {allowed_values(option)}."
            + (" A setting that is a text needs choices." if isinstance(written, str) else "")
        )
    for base in settings_class.__mro__[1:]:
        earlier = getattr(base, "__dataclass_fields__", {}).get(option.name)
        if earlier is None and hasattr(base, option.name):
            raise MethodError(f"The setting {option.name!r} of {name} hides a method of {base.__name__}. Rename it.")
        if earlier is not None and _kind(earlier) != _kind(option):
            raise MethodError(
                f"The setting {option.name!r} of {name} is one of {base.__name__}, with other values: "
                f"{allowed_values(option)} instead of {allowed_values(earlier)}. Only its default and its range may "
                "change. Rename it."
            )


def _kind(option: Field[Any]) -> tuple[Any, ...]:
    """What a class that derives from a setting's may not change."""
    return tuple(option.metadata[name] for name in ("choices", "integer", "optional"))


def _check_place(configuration: Mapping[str, Any], plans: Mapping[str, Any], known: Collection[str]) -> None:
    """Whether there are settings that nothing would read."""
    for key in configuration:
        if key != PLANS_KEY and closest(key, [PLANS_KEY], cutoff=0.8):
            raise UserError(
                f"The configuration in the plans has the entry {key!r}, which nothing reads. Did you mean "
                f"'{PLANS_KEY}'? Rename it."
            )
        if key in known:
            raise UserError(
                f"The configuration in the plans has the setting {key!r} outside of '{PLANS_KEY}', where nothing reads "
                "it. Move it into that table."
            )
    for key in plans:
        if closest(key, [PLANS_KEY], cutoff=0.8):
            raise UserError(
                f"The plans have the entry {key!r} outside of the configurations, where nothing reads it. Move it into "
                f"the configuration that you train, as '{PLANS_KEY}'."
            )
    if PLANS_KEY in plans.get("configurations", {}):
        raise UserError(
            f"The plans have '{PLANS_KEY}' as a configuration, where nothing reads it. Move it into the configuration "
            "that you train."
        )


def _problem(option: dataclasses.Field[Any], value: Any) -> str | None:
    """What is wrong with a value, or None."""
    allowed = option.metadata
    if value is None and allowed["optional"]:
        return None
    if allowed["choices"] is not None:
        # `1 == True`: compare the types as well, so that 1 is not taken for an on switch.
        if any(type(value) is type(choice) and value == choice for choice in allowed["choices"]):
            return None
        return _out_of_range(option, value, "one of " + ", ".join(map(repr, allowed["choices"])))
    kind = "a whole number" if allowed["integer"] else "a number"
    numeric = isinstance(value, int) if allowed["integer"] else isinstance(value, (int, float))
    low, high = allowed["minimum"], allowed["maximum"]
    if low is not None and high is not None:
        kind += f" from {low:g} to {high:g}"
    elif low is not None:
        kind += f" of at least {low:g}"
    elif high is not None:
        kind += f" of at most {high:g}"
    inside = (
        numeric
        and not isinstance(value, bool)
        and abs(value) <= sys.float_info.max
        and (low is None or value >= low)
        and (high is None or value <= high)
    )
    return None if inside else _out_of_range(option, value, kind + (", or null" if allowed["optional"] else ""))


def _out_of_range(option: dataclasses.Field[Any], value: Any, allowed: str) -> str:
    return (
        f"The setting '{option.name}' in the plans' '{PLANS_KEY}' is {value!r}; allowed is {allowed} "
        f"({option.metadata['help']})."
    )
