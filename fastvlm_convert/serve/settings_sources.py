"""Where the settings come from: the command line, the environment, a file, defaults."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args, get_origin

import annotated_types
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from fastvlm_convert.errors import SettingsError, did_you_mean, shown
from fastvlm_convert.serve.setting_facts import SettingFacts, SettingValue
from fastvlm_convert.serve.settings import PREFIX, Settings
from fastvlm_convert.yaml_file import lines_of_keys, read_yaml_file

_MAX_BYTES: Final = 1_000_000
_DEFAULT: Final = "default"

# What other servers, and the first description of this one, let people set, and a bundle was made with.
_BUNDLE_DECIDES: Final = (
    "image_size", "image_mode", "image_resolution", "bits", "quantization", "quantization_bits", "quantize",
    "precision", "dtype", "context", "context_length", "max_context", "max_context_length",
    "max_model_len", "prompt", "prompt_template", "chat_template", "system_prompt", "tokenizer", "recipe",
)  # fmt: skip
_KUBERNETES: Final = ("_SERVICE_HOST", "_SERVICE_PORT", "_TCP", "_TCP_ADDR", "_TCP_PORT", "_TCP_PROTO")


@dataclass(frozen=True)
class LoadedSettings:
    """Settings, and where each is from.

    Attributes:
        settings: The values.
        origins: By the name of a setting: `command line`, `environment FAST_VLM_X`, `FILE:LINE` or `default`.
    """

    settings: Settings
    origins: Mapping[str, str]


def load_settings(options: Mapping[str, Any] | None = None, file: Path | None = None) -> LoadedSettings:
    """The settings: the command line's win, then the environment's, then the file's, then the defaults.

    Args:
        options: From the command line, by the name of the setting; None where an option is not given.
        file: A YAML file such as `configs/serve.yaml`.

    Raises:
        SettingsError: A setting is unknown, impossible or decided by the bundle, two exclude each other, or
            the file cannot be read.
    """
    given = {name: value for name, value in (options or {}).items() if value is not None}
    variables = {
        key[len(PREFIX) :].lower(): key
        for key, value in os.environ.items()
        if key.upper().startswith(PREFIX) and value  # an empty one is as good as none
    }
    written, lines = _from_file(file)
    origins = {
        **lines,
        **{name: f"environment {key}" for name, key in variables.items()},
        **{name: f"command line, --{name.replace('_', '-')}" for name in given},
    }
    for name, origin in origins.items():
        _check_name(name, origin)
    try:
        # pydantic-settings reads the environment, but lets it win over nothing that is passed.
        settings = Settings(
            **({name: value for name, value in written.items() if name not in variables} | given)
        )
    except ValidationError as error:
        name, value = str(error.errors()[0]["loc"][0]), error.errors()[0]["input"]
        raise _impossible(name, value, origins[name]) from None
    except SettingsError as error:
        places = [f"{name}: {origins.get(name, _DEFAULT)}" for name in error.settings]
        raise SettingsError(
            error.args[0], error.settings, where="; ".join(places), hint=error.given_hint
        ) from None
    _check_key_file(settings, origins)
    return LoadedSettings(settings, {name: origins.get(name, _DEFAULT) for name in Settings.model_fields})


def setting_facts(loaded: LoadedSettings) -> list[SettingFacts]:
    """All settings, in the order of their declaration. What is in key files is not among them."""
    return [
        SettingFacts(
            name=name,
            environment=f"{PREFIX}{name.upper()}",
            value=_plain(getattr(loaded.settings, name)),
            default=_plain(field.default),
            origin=loaded.origins[name],
            allowed=allowed_values(field),
            description=field.description or "",
        )
        for name, field in Settings.model_fields.items()
    ]


def allowed_values(field: FieldInfo) -> str:
    """What a setting may be, in words."""
    kinds = get_args(field.annotation) if get_origin(field.annotation) is not Literal else ()
    kind = next((kind for kind in kinds if kind is not type(None)), field.annotation)
    if get_origin(field.annotation) is tuple:
        return "addresses or networks"
    if get_origin(kind) is Literal:
        *most, last = get_args(kind)
        words = f"{', '.join(most)} or {last}"
    elif kind is bool:
        words = "true or false"
    elif kind in (int, float):
        words = ("an integer" if kind is int else "a number") + _range(field)
    elif kind is Path:
        words = "a path"
    elif kind is str:
        words = "a text"
    else:
        words = "a name of letters, digits and ._:/-"
    return f"{words}, or null" if type(None) in kinds else words


def _range(field: FieldInfo) -> str:
    """The limits of a number, which all numbers but some without a lower one have."""
    low, high = "", ""
    for limit in field.metadata:
        if isinstance(limit, annotated_types.Ge):
            low = f" from {limit.ge} to "
        elif isinstance(limit, annotated_types.Gt):
            low = f" above {limit.gt}, at most "
        elif isinstance(limit, annotated_types.Le):
            high = str(limit.le)
    return f"{low or ' of at most '}{high}"


def _plain(value: object) -> SettingValue:
    if isinstance(value, tuple):
        return ",".join(value)
    if value is None or isinstance(value, str | bool | int | float):
        return value
    return str(value)


def _from_file(path: Path | None) -> tuple[dict[str, Any], dict[str, str]]:
    """Values and origins by name."""
    if path is None:
        return {}, {}
    try:
        values = read_yaml_file(path, _MAX_BYTES)
        lines = lines_of_keys(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"cannot read the settings: {error.strerror}", where=path) from error
    except ValueError as error:
        raise SettingsError(str(error), where=path) from error
    if values is None:
        return {}, {}
    if not isinstance(values, dict):
        raise SettingsError(f"the file has {shown(values)}, expected settings with their values", where=path)
    return {str(key): value for key, value in values.items()}, {
        str(key): f"{path}:{lines[key]}" if key in lines else str(path) for key in values
    }


def _check_name(name: str, origin: str) -> None:
    """Never shows the value: a name that is unknown can be that of a secret."""
    if name in Settings.model_fields:
        return
    if name in _BUNDLE_DECIDES:
        raise SettingsError(
            f"{name} is no setting of the server: the bundle decides it",
            (name,),
            where=origin,
            hint="export a bundle that was made so, and serve that",
        )
    hint = did_you_mean(name, Settings.model_fields)
    if origin.startswith("environment") and name.upper().endswith(_KUBERNETES):
        hint = "Kubernetes sets it for a Service named fast-vlm: give the Service another name; "
    raise SettingsError(
        f"there is no setting {shown(name)}", (name,), where=origin, hint=f"{hint}{SettingsError.next_step}"
    )


def _impossible(name: str, value: object, origin: str) -> SettingsError:
    field = Settings.model_fields[name]
    return SettingsError(f"{name} is {shown(value)}, expected {allowed_values(field)}", (name,), where=origin)


def _check_key_file(settings: Settings, origins: Mapping[str, str]) -> None:
    """Never shows the value: it can be a key that was given instead of a file."""
    if settings.api_key_file is not None and not settings.api_key_file.is_file():
        raise SettingsError(
            "api_key_file names no file",
            ("api_key_file",),
            where=origins["api_key_file"],
            hint="write the keys to a file, one a line, and give its path",
        )
