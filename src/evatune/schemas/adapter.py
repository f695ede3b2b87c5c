"""The config of a saved LoRA adapter, as far as ranks and scales depend on it, and its patterns."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from evatune.schemas.format_error import FormatError, short_repr
from evatune.schemas.text import fitting

_Rank = Annotated[int, Field(ge=1, le=2**24)]
_Alpha = Annotated[float, Field(gt=0, le=1e9)]
_Name = Annotated[str, Field(max_length=1024)]
_Pattern = Annotated[str, Field(max_length=16384)]  # names of many layers, with bars between
_Names = list[_Name] | _Pattern | None
_Places = list[Annotated[int, Field(ge=0, le=2**31)]]
_Pair = Annotated[list[Annotated[int, Field(ge=0, le=4096)]], Field(min_length=2, max_length=2)]

_TRIAL_SECONDS = 5.0


class LoraRecord(BaseModel):
    """The keys that decide which layers have which rank and scale.

    Other keys are left to PEFT, which has more with every version.
    """

    model_config = ConfigDict(strict=True, extra="ignore")

    r: _Rank = 8
    lora_alpha: _Alpha = 8
    lora_dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
    rank_pattern: dict[_Pattern, _Rank] | None = None
    alpha_pattern: dict[_Pattern, _Alpha] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    fan_in_fan_out: bool = False
    inference_mode: bool = False
    bias: Annotated[str, Field(pattern="^(none|all|lora_only)$")] = "none"
    target_modules: _Names = None
    exclude_modules: _Names = None
    target_parameters: list[_Name] | None = None
    modules_to_save: list[_Name] | None = None
    layers_to_transform: _Places | Annotated[int, Field(ge=0, le=2**31)] | None = None
    layers_pattern: _Names = None
    layer_replication: Annotated[list[_Pair], Field(max_length=1024)] | None = None
    init_lora_weights: bool | _Name = True
    task_type: _Name | None = None
    base_model_name_or_path: _Name | None = None
    revision: _Name | None = None


def require_lora(fields: Mapping[str, Any]) -> None:
    """Raise FormatError unless these are fields of a LoRA config, in types and ranges.

    PEFT itself checks neither.
    """
    with fitting():
        TypeAdapter(LoraRecord).validate_python(dict(fields))
    for pattern, expression in _patterns(fields):
        try:
            re.compile(expression)
        except (re.error, RecursionError, OverflowError) as error:
            raise FormatError(
                f"holds the pattern {short_repr(pattern)}, which is no regular expression ({error})"
            ) from error


def require_quick(fields: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise FormatError for patterns that take too long on these names, as nested repetitions do.

    PEFT hands them to `re`, which nothing can stop. So those with more than one repetition or
    choice are first tried in another process, which can be stopped.
    """
    doubtful = [
        expression for pattern, expression in _patterns(fields) if _repetitions(pattern) > 1
    ]
    if not doubtful:
        return
    work = json.dumps({"patterns": doubtful, "names": list(names)})
    try:
        subprocess.run(
            [sys.executable, "-I", "-S", "-c", _TRIAL],
            input=work,
            text=True,
            check=True,
            timeout=_TRIAL_SECONDS,
        )
    except (subprocess.SubprocessError, OSError) as error:
        raise FormatError(
            "holds patterns that cannot be matched with the names of the layers within "
            f"{_TRIAL_SECONDS:g} s, among them {short_repr(doubtful[0])}"
        ) from error


_TRIAL = """
import json, re, sys
work = json.load(sys.stdin)
for pattern in work["patterns"]:
    match = re.compile(pattern).match
    for name in work["names"]:
        match(name)
"""


def _patterns(fields: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield patterns, and the regular expressions that PEFT makes of them for names of modules."""
    of_keys = [*(fields.get("rank_pattern") or ()), *(fields.get("alpha_pattern") or ())]
    targets = [fields.get("target_modules"), fields.get("exclude_modules")]
    by_form = {
        r"(.*\.)?({})$": of_keys,
        r"({})\Z": [target for target in targets if isinstance(target, str)],
        r"(?:^|.*?\.){}\.(?P<idx>\d+)\.": _listed(fields.get("layers_pattern")),
        r"(^|.*\.){}($|\..*)": _listed(fields.get("modules_to_save")),
    }
    for form, patterns in by_form.items():
        for pattern in patterns:
            yield pattern, form.format(pattern)


def _repetitions(pattern: str) -> int:
    """Count the signs that let a pattern match in more than one way."""
    return sum(pattern.count(sign) for sign in "*+?{|")


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())
