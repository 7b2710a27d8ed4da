"""Configurations and states as JSON files: size-capped, strictly typed, unknown keys refused. No torch here."""

from __future__ import annotations

import dataclasses
import json
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ferrovae.training.configuration import Configuration, TrainVAE, TrainVQVAE
from ferrovae.training.errors import ConfigurationError

MAX_JSON_BYTES = 1 << 20
KINDS: dict[str, type[TrainVAE] | type[TrainVQVAE]] = {"vae": TrainVAE, "vqvae": TrainVQVAE}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        ConfigurationError: it is larger than 1 MiB, not UTF-8 JSON, or not an object.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        text = file.read(MAX_JSON_BYTES + 1)
    if len(text) > MAX_JSON_BYTES:
        raise ConfigurationError(f"{path}: larger than {MAX_JSON_BYTES} bytes, which no file of ours is")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ConfigurationError(f"{path}: holds {type(value).__name__}, expected a JSON object")
    return value


def to_dict(config: Configuration) -> dict[str, Any]:
    """`config` as plain JSON values, its kind under "model"."""
    return {"model": config.kind, **json.loads(json.dumps(dataclasses.asdict(config)))}


def from_dict(values: dict[str, Any], source: str = "configuration") -> Configuration:
    """The configuration `to_dict` wrote, checked; missing keys take their defaults.

    Raises:
        ConfigurationError: an unknown model or key, a value of the wrong type or out of range; names `source`.
    """
    values = dict(values)
    kind = values.pop("model", None)
    if not isinstance(kind, str) or kind not in KINDS:
        raise ConfigurationError(f"{source}: model is {kind!r}, expected one of {', '.join(KINDS)}")
    cls = KINDS[kind]
    hints = get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    unknown = sorted(set(values) - set(names))
    if unknown:
        raise ConfigurationError(f"{source}: unknown key {unknown[0]!r} for model {kind!r}")
    try:
        config = cls(**{name: _typed(value, hints[name], name) for name, value in values.items()})
        config.validate()
    except ConfigurationError as error:
        raise ConfigurationError(f"{source}: {error}") from None
    return config


def load_configuration(run_dir: Path) -> Configuration:
    """The configuration in `run_dir/config.json`."""
    path = run_dir / "config.json"
    if not path.is_file():
        raise ConfigurationError(f"{run_dir} is not a run: it has no config.json")
    return from_dict(read_json(path), str(path))


def _typed(value: Any, hint: Any, name: str) -> Any:
    """`value` as `hint` wants it: an int passes for a float, a list for a tuple, nothing else is converted."""
    matched, result = _match(value, hint)
    if not matched:
        raise ConfigurationError(f"{name} is {value!r}, expected {_describe(hint)}")
    return result


def _match(value: Any, hint: Any) -> tuple[bool, Any]:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        for option in get_args(hint):
            matched, result = _match(value, option)
            if matched:
                return True, result
        return False, None
    if origin is Literal:
        return isinstance(value, str) and value in get_args(hint), value
    if origin is tuple:
        element = get_args(hint)[0]
        if not isinstance(value, list | tuple) or not all(_match(item, element)[0] for item in value):
            return False, None
        return True, tuple(value)
    if hint is float:
        number = isinstance(value, float | int) and not isinstance(value, bool)
        return number, float(value) if number else None
    return type(value) is hint, value


def _describe(hint: Any) -> str:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(option) for option in get_args(hint))
    if origin is Literal:
        return "one of " + ", ".join(map(repr, get_args(hint)))
    if origin is tuple:
        return f"a list of {get_args(hint)[0].__name__}"
    return "null" if hint is type(None) else hint.__name__
