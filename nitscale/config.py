"""Typed configuration: a tree of dataclasses, filled from YAML files and dotted overrides.

A YAML file may name another under `base:` (relative to itself); its own keys win over the base's, and overrides
such as `train.steps=100` win over both. Every key is checked against the dataclasses: an unknown key or a value of
the wrong type is an error that names the key, where it was written, and the nearest valid name. OmegaConf reads the
YAML, merges the layers and resolves `${...}` references; the types are checked here, for the sake of the messages.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nitscale.errors import UserError

T = TypeVar("T")
Origins = dict[str, str]
"""Where each dotted key was last written: a file or the command line."""


def load_config(schema: type[T], path: str | Path | None = None, overrides: Sequence[str] = ()) -> T:
    """The dataclass `schema` filled from the YAML file `path` (and its bases), then from `key=value` overrides."""
    layers = read_layers(Path(path)) if path is not None else []
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key.strip():
            raise UserError(f"config: override '{override}' is not of the form key=value, e.g. train.steps=100")
        try:
            layers.append((f"override '{override}'", OmegaConf.to_container(OmegaConf.from_dotlist([override]))))
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise UserError(f"config: override '{override}' cannot be read: {error}") from None
    origins: Origins = {}
    for origin, layer in layers:
        origins.update({key: origin for key in dotted_keys(layer)})
    try:
        merged = OmegaConf.to_container(OmegaConf.merge(*[layer for _, layer in layers] or [{}]), resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"config: {path}: {error}") from None
    return typing.cast(T, build(schema, merged, "", origins))


def to_yaml(config: Any) -> str:
    """The resolved configuration as YAML; `load_config` of it gives the same configuration back."""
    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))


def read_layers(path: Path, seen: tuple[Path, ...] = ()) -> list[tuple[str, Any]]:
    """(origin, content) of the bases of a YAML file, outermost first, then of the file itself."""
    resolved = path.resolve()
    if resolved in seen:
        raise UserError(
            f"config: {path} is its own base, through {' -> '.join(str(p) for p in seen)}; remove one `base:`"
        )
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except FileNotFoundError:
        where = f" (named as base by {seen[-1]})" if seen else ""
        raise UserError(f"config: no file {path}{where}; give a path to a YAML file, e.g. configs/demo.yaml") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config: {path} cannot be read: {error}") from None
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"config: {path} is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"config: {path} must hold `key: value` lines, it holds a {type(content).__name__}")
    base = content.pop("base", None)
    below = read_layers(path.parent / base, (*seen, resolved)) if base is not None else []
    return [*below, (str(path), content)]


def dotted_keys(tree: Any, prefix: str = "") -> list[str]:
    """Every key of a nested dictionary, inner nodes too, as dotted paths."""
    if not isinstance(tree, dict):
        return []
    keys = []
    for name, value in tree.items():
        keys += [f"{prefix}{name}", *dotted_keys(value, f"{prefix}{name}.")]
    return keys


def build(kind: Any, value: Any, key: str, origins: Origins) -> Any:
    """`value` as an instance of the annotated type `kind`; `key` is its dotted path, for messages."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return build_dataclass(kind, value, key, origins)
    if kind is Any:
        return value
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        inner = [argument for argument in arguments if argument is not type(None)]
        assert len(inner) == 1, f"config fields may be `T | None` only, {key} is {kind}"
        return build(inner[0], value, key, origins)
    if origin is typing.Literal:
        if value not in arguments:
            choices = ", ".join(str(choice) for choice in arguments)
            near = difflib.get_close_matches(str(value), [str(choice) for choice in arguments], n=1)
            raise mistake(key, value, f"one of: {choices}", origins, near[0] if near else None)
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise mistake(key, value, "a list", origins)
        if arguments[-1] is Ellipsis:
            return tuple(build(arguments[0], item, f"{key}[{i}]", origins) for i, item in enumerate(value))
        if len(value) != len(arguments):
            raise mistake(key, value, f"a list of {len(arguments)} values", origins)
        return tuple(
            build(t, item, f"{key}[{i}]", origins) for i, (t, item) in enumerate(zip(arguments, value, strict=True))
        )
    return build_scalar(kind, value, key, origins)


def build_dataclass(kind: type, value: Any, key: str, origins: Origins) -> Any:
    if not isinstance(value, dict):
        raise mistake(key, value, "a section with keys of its own", origins)
    annotations = typing.get_type_hints(kind)
    known = [field.name for field in dataclasses.fields(kind)]
    prefix = f"{key}." if key else ""
    for name in value:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
            hint = f"did you mean '{prefix}{near[0]}'?" if near else f"valid keys here: {', '.join(known)}"
            raise UserError(
                f"config: unknown key '{prefix}{name}' in {origins.get(f'{prefix}{name}', 'the configuration')}; {hint}"
            )
    arguments = {name: build(annotations[name], item, f"{prefix}{name}", origins) for name, item in value.items()}
    missing = [
        field.name
        for field in dataclasses.fields(kind)
        if field.name not in arguments
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    for name in missing:
        # A section without a default of its own may still be made of defaults only.
        if dataclasses.is_dataclass(annotations[name]):
            arguments[name] = build(annotations[name], {}, f"{prefix}{name}", origins)
        else:
            raise UserError(f"config: '{prefix}{name}' is not set; write it in the YAML file or give {prefix}{name}=…")
    try:
        return kind(**arguments)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"config: section '{key or 'run'}': {error}") from None


def build_scalar(kind: Any, value: Any, key: str, origins: Origins) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is float and isinstance(value, str):
        try:  # YAML 1.1 reads 1e-4 (without a dot) as text
            return float(value)
        except ValueError:
            pass
    if kind is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        raise mistake(key, value, names.get(kind, str(kind)), origins)
    return value


def mistake(key: str, value: Any, wanted: str, origins: Origins, near: str | None = None) -> UserError:
    hint = f"; did you mean '{near}'?" if near else ""
    where = origins.get(key.split("[")[0], "the configuration")
    return UserError(f"config: '{key}' in {where} must be {wanted}, got {value!r}{hint}")
