"""Recipes: YAML files of run settings, ours and the official code's args/*.yaml unchanged, with overrides.

The official keys that do not have our name or meaning are translated here, and nowhere else:

    model_id                            model
    coconut, cot, no_thoughts, no_cot   method (all False: pause_as_thought, which is what it then trains)
    reset_optimizer: True / False       "epoch" / "never" (the official code makes a new optimizer every epoch)
    bf16: True / False                  precision: bf16_weights / fp32 (the official code casts the weights too)
    load_model_path: "None"             none
"""

from __future__ import annotations

import difflib
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import yaml

from coconut_fast.train.arguments import RENAMED_FIELDS, CoconutArguments

FLAGS = ("no_cot", "cot", "no_thoughts", "coconut")  # in the official code, earlier ones win
RENAMED = {"model_id": "model"}
NUMBER = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")  # 1e-5, which YAML 1.1 reads as text
TYPES = typing.get_type_hints(CoconutArguments)
# Settings that are text; reset_optimizer may be true or false in the official files.
TEXT = {"model_id", *(key for key, kind in TYPES.items() if str in (kind, *typing.get_args(kind)))} - {
    "reset_optimizer"
}
WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a mapping",
    list: "a list",
}


class DuplicateKeyError(ValueError):
    """A key that a mapping has twice."""


def read_recipe(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> CoconutArguments:
    """A recipe file and `key=value` overrides -> settings.

    Values are YAML; a key of a mapping is written `model.n_layer=4`. ValueError, naming the file (or the override), the
    key, what was found and what is expected, for anything that cannot be read, an unknown key (with the nearest known
    one), or a value of the wrong type.
    """
    return make_arguments(_read_yaml(path), parse_overrides(overrides), where=str(path))


def make_arguments(
    file: Mapping[str, Any], overrides: Mapping[str, Any] | None = None, where: str = "settings"
) -> CoconutArguments:
    """Settings from a mapping of keys (ours or the official ones) and overriding ones."""
    overrides = dict(overrides or {})
    translated = _translate(dict(file), where)
    nested = {key: value for key, value in overrides.items() if "." in key}
    changes = _translate({key: value for key, value in overrides.items() if "." not in key}, "override")
    merged = {**translated, **changes}
    if "method" not in overrides and (method := _method_of_flags(file, overrides, where)) is not None:
        merged["method"] = method
    for key, value in nested.items():
        name, inner = key.split(".", 1)
        name = RENAMED.get(name, name)
        if not isinstance(merged.get(name, {} if name == "training_arguments" else None), dict):
            raise ValueError(f"override: {key}: {name} is not a mapping here, so it has no {inner!r}")
        merged[name] = {**merged.get(name, {}), inner: _number(value)}
    return CoconutArguments(**merged)


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """["lr=3e-4", "model.n_layer=2"] -> {"lr": "3e-4", "model.n_layer": 2}; values are YAML, except text settings."""
    parsed = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"override: found {text!r}, expected key=value")
        try:
            _check_keys(yaml.compose(value), f"override: {key}")
            read, written = yaml.safe_load(value), yaml.load(value, yaml.BaseLoader)
        except DuplicateKeyError:
            raise
        except Exception as error:  # a date in month 13, a number without digits: yaml raises anything
            raise ValueError(f"override: {key}: {value!r} is not YAML") from error
        parsed[key.strip()] = _as_written(key.strip(), read, written)
    return parsed


def _read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        _check_keys(yaml.compose(text), path)
        content, written = yaml.safe_load(text), yaml.load(text, yaml.BaseLoader)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); expected a YAML file of settings") from error
    except DuplicateKeyError:
        raise
    except Exception as error:  # not UTF-8, a date in month 13, a number without digits: yaml raises anything
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark else ""
        raise ValueError(f"{path}: not YAML{line}; expected lines of `key: value`") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: found {type(content).__name__}, expected lines of `key: value`")
    return {key: _as_written(key, value, written.get(key, value)) for key, value in content.items()}


def _check_keys(node: yaml.Node | None, path: str | os.PathLike[str]) -> None:
    """DuplicateKeyError where a mapping has a key twice, of which yaml would take the last."""
    nodes, seen = [node], set()  # a node may be part of itself
    while nodes:
        node = nodes.pop()
        if isinstance(node, yaml.CollectionNode) and id(node) not in seen:
            seen.add(id(node))
            nodes += chain.from_iterable(node.value) if isinstance(node, yaml.MappingNode) else node.value
        if isinstance(node, yaml.MappingNode):
            keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
            for before, key in enumerate(keys):
                if any((key.tag, key.value) == (other.tag, other.value) for other in keys[:before]):
                    line = key.start_mark.line + 1
                    raise DuplicateKeyError(f"{path}: line {line}: found {key.value} again, expected it once")


def _as_written(key: str, value: Any, written: Any) -> Any:
    """Text settings as written, where YAML reads `no` as False, 2026-11-26 as a date and 007 as 7."""
    return value if key not in TEXT or isinstance(value, str | dict | list | None) else written


def _translate(found: dict[str, Any], where: str) -> dict[str, Any]:
    """Our keys, with values of the right type."""
    official = {key for key in found if key in FLAGS or key in ("model_id", "bf16")}
    known = [*TYPES, *FLAGS, "model_id", "bf16"]
    for key in found:
        if key not in known:
            nearest = _nearest(str(key), [*known, *RENAMED_FIELDS])
            named = f"the nearest known one is {nearest!r}"
            if nearest in RENAMED_FIELDS:
                named = f"{nearest} is called {RENAMED_FIELDS[nearest]} here"
            raise ValueError(f"{where}: unknown key {key!r}; {named}")
    set_flags = [("method", flag) for flag in FLAGS if found.get(flag)]  # one set to false may stand beside a method
    for own, theirs in (("model", "model_id"), ("precision", "bf16"), *set_flags):
        if own in found and theirs in found:
            raise ValueError(f"{where}: found {own} and {theirs}, expected one of them")
    result = {key: value for key, value in found.items() if key not in official}
    if "model_id" in found:
        result["model"] = found["model_id"]
    if "bf16" in found:
        result["precision"] = "bf16_weights" if _typed("bf16", found["bf16"], bool, where) else "fp32"
    if isinstance(result.get("reset_optimizer"), bool):
        result["reset_optimizer"] = "epoch" if result["reset_optimizer"] else "never"
    return {key: _typed(key, value, TYPES[key], where) for key, value in result.items()}


def _nearest(key: str, known: list[str]) -> str:
    """A key that begins with the unknown one, else the most similar."""

    def likeness(candidate: str) -> float:
        return candidate.startswith(key) + difflib.SequenceMatcher(None, key, candidate).ratio()

    return max(known, key=likeness)


def _method_of_flags(file: Mapping[str, Any], overrides: Mapping[str, Any], where: str) -> str | None:
    """The method that the official flags choose; None: they do not.

    Flags that an override sets to true decide alone. Where it only sets some to false, the file's other flags decide,
    unless the file has no flags or has `method`.
    """
    theirs, ours = _flags(file, where), _flags(overrides, "override")
    if any(ours.values()):
        return _method(ours, "override")
    if theirs and "method" not in file:
        return _method({**theirs, **ours}, where)
    method = file.get("method", CoconutArguments.method)
    if ours.get(method) is False:
        raise ValueError(f"override: {method}: found false, but {where} has method {method}; expected another method=")
    return None


def _flags(found: Mapping[str, Any], where: str) -> dict[str, bool]:
    return {flag: _typed(flag, found[flag], bool, where) for flag in FLAGS if flag in found}


def _method(flags: Mapping[str, bool], where: str) -> str:
    chosen = [flag for flag in FLAGS if flags.get(flag)]
    others = [flag for flag in chosen if flag != "coconut"]
    if len(others) > 1:
        raise ValueError(f"{where}: found {' and '.join(others)} set, expected at most one of cot, no_cot, no_thoughts")
    return chosen[0] if chosen else "pause_as_thought"


def _typed(key: str, value: Any, kind: Any, where: str) -> Any:
    """`value` as `kind`; YAML 1.1 reads 1e-4 as text, and the official files write None as text."""
    union = isinstance(kind, types.UnionType)
    kinds = [typing.get_origin(k) or k for k in (typing.get_args(kind) if union else (kind,))]
    if value in (None, "None") and type(None) in kinds:
        return None
    for wanted in kinds:
        if wanted is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:
                return float(value)
            except (ValueError, OverflowError):
                continue
        if wanted is int and isinstance(value, float) and value.is_integer():
            return int(value)
        if isinstance(value, wanted) and not (isinstance(value, bool) and wanted is int):
            if (
                isinstance(value, dict)
                and (odd := next((k for k in value if not isinstance(k, str)), None)) is not None
            ):
                raise ValueError(f"{where}: {key}: found the key {odd!r}, expected text")
            return _numbers(value)
        if wanted is str and isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(value)  # `name: 3`
    expected = " or ".join(WORDS[k] for k in kinds if k in WORDS)
    raise ValueError(f"{where}: {key}: found {value!r}, expected {expected}")


def _numbers(value: Any) -> Any:
    """`value` with numbers, at any depth of its mappings and lists, where YAML 1.1 reads text."""
    if isinstance(value, dict):
        return {key: _number(inner) for key, inner in value.items()}
    return [_number(inner) for inner in value] if isinstance(value, list) else value


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, str) and NUMBER.fullmatch(value) else _numbers(value)
