"""The table of phones: what is published of them, each fact with its source and its date."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Final, Literal

from fastvlm_convert.dataclass_io import about, from_plain
from fastvlm_convert.errors import PhonesError, RecipeError, shown
from fastvlm_convert.yaml_file import read_yaml_file

MAX_BYTES: Final = 1 << 20
MAX_PHONES: Final = 1000
OperatingSystem = Literal["ios", "android"]
UnitName = Literal["cpu", "gpu", "npu"]
Arithmetic = Literal["float32", "float16", "int8", "unstated"]
Basis = Literal["published", "reported", "measured", "derived"]
Unknown = Literal["unknown"]

_MAX_TEXT: Final = 500
_DATE: Final = re.compile(r"\d{4}-(0[1-9]|1[0-2])(-(0[1-9]|[12]\d|3[01]))?")
# Far above any phone of today; a larger number has the wrong unit.
_MOST: Final = {
    "ram_gb": 256.0, "app_limit_gb": 256.0,
    "bandwidth_gb_per_s": 10_000.0, "tera_operations_per_s": 100_000.0,
}  # fmt: skip
_SHAPE: Final = "value (above 0), basis, source and date (2026-11-28 or 2026-11), or unknown"
_BASIS: Final = (
    "What it rests on: published by the vendor, reported by others, measured by somebody, or derived from "
    "other facts."
)
_SOURCE: Final = "Where it stands, how it was measured, or what it is derived from."
_WHEN: Final = "When the source says so: 2026-11-28 or 2026-11."


@dataclass(frozen=True)
class Fact:
    """A number with its source."""

    value: float = field(
        metadata=about("The number, in the unit that its setting names.", exclusive_minimum=0)
    )
    basis: Basis = field(metadata=about(_BASIS))
    source: str = field(metadata=about(_SOURCE))
    date: str = field(metadata=about(_WHEN))

    def __post_init__(self) -> None:
        if not math.isfinite(self.value) or self.value <= 0:
            raise PhonesError(f"value is {shown(self.value)}, expected a number above 0")
        _check_source(self.source, self.date)


@dataclass(frozen=True)
class Peak:
    """How much a part of a chip computes at best."""

    unit: UnitName = field(metadata=about("The part."))
    arithmetic: Arithmetic = field(
        metadata=about("What it is counted in; unstated where the source does not say.")
    )
    tera_operations_per_s: float = field(
        metadata=about(
            "10^12 operations a second; a multiplication and an addition are two.", exclusive_minimum=0
        )
    )
    basis: Basis = field(metadata=about(_BASIS))
    source: str = field(metadata=about(_SOURCE))
    date: str = field(metadata=about(_WHEN))

    def __post_init__(self) -> None:
        value = self.tera_operations_per_s
        _check_number("tera_operations_per_s", value)
        _check_source(self.source, self.date)


@dataclass(frozen=True)
class Phone:
    """A phone, or a chip where a figure was published for one."""

    name: str = field(metadata=about("Its name, unique in a table."))
    chip: str = field(metadata=about("Its chip."))
    os: OperatingSystem = field(metadata=about("Its operating system, which decides what formats it runs."))
    ram_gb: Fact | Unknown = field(metadata=about("Memory, in 10^9 bytes or as vendors count it."))
    app_limit_gb: Fact | Unknown = field(
        metadata=about("Memory at which the system ends an app, in 10^9 bytes.")
    )
    bandwidth_gb_per_s: Fact | Unknown = field(
        metadata=about("What memory delivers at best, in 10^9 bytes a second.")
    )
    peaks: tuple[Peak, ...] = field(metadata=about("What its parts compute at best; empty where unknown."))

    def __post_init__(self) -> None:
        for key in ("name", "chip"):
            if not getattr(self, key).strip() or len(getattr(self, key)) > _MAX_TEXT:
                raise PhonesError(f"{key} is {shown(getattr(self, key))}, expected a text")
        for key in ("ram_gb", "app_limit_gb", "bandwidth_gb_per_s"):
            fact = getattr(self, key)
            if isinstance(fact, Fact):
                _check_number(f"{key}.value", fact.value, _MOST[key])
        ram, limit = (known(fact) for fact in (self.ram_gb, self.app_limit_gb))
        if ram is not None and limit is not None and limit > ram:
            raise PhonesError(f"app_limit_gb is {limit:g}, more than the phone's ram_gb of {ram:g}")


def known(fact: Fact | Unknown) -> float | None:
    """The number, or None where it is not published."""
    return fact.value if isinstance(fact, Fact) else None


def _check_number(key: str, value: float, most: float = _MOST["tera_operations_per_s"]) -> None:
    if not 0 < value <= most:  # not so for NaN either
        raise PhonesError(f"{key} is {shown(value)}, expected a number above 0 and at most {most:g}")


def _check_source(source: str, date: str) -> None:
    if not source.strip() or len(source) > _MAX_TEXT:
        raise PhonesError(f"source is {shown(source)}, expected where the number comes from")
    if _DATE.fullmatch(date) is None:
        raise PhonesError(f"date is {shown(date)}, expected one such as 2026-11-28 or 2026-11")


def shipped_phones() -> tuple[Phone, ...]:
    """The table that comes with the tool."""
    return load_phones(Path(str(resources.files("fastvlm_convert.estimate"))) / "phones.yaml")


def load_phones(path: Path) -> tuple[Phone, ...]:
    """Read a table of phones.

    Args:
        path: A YAML file: `phones`, a list with the settings of `Phone` each.

    Raises:
        PhonesError: It cannot be read, is no YAML, or a row is malformed or impossible; says which and why.
    """
    try:
        content = read_yaml_file(path, MAX_BYTES)
        phones = tuple(_phones(content))
    except FileNotFoundError as error:
        raise PhonesError("there is no such file", where=path) from error
    except OSError as error:
        raise PhonesError(f"cannot read: {error.strerror or error}", where=path) from error
    except (PhonesError, RecipeError) as error:
        raise PhonesError(error.args[0], where=path, hint=error.given_hint or _hint(error.args[0])) from error
    except ValueError as error:
        raise PhonesError(str(error), where=path) from error
    return phones


def _hint(problem: str) -> str | None:
    return f"a fact is {_SHAPE}" if any(f".{key}" in problem for key in _MOST) else None


def _phones(content: object) -> Iterator[Phone]:
    if not isinstance(content, dict) or set(content) != {"phones"} or not isinstance(content["phones"], list):
        raise PhonesError(
            "expected one key, phones, with a list of them", hint="docs/estimate.md has an example"
        )
    rows: list[Any] = content["phones"]
    if not 0 < len(rows) <= MAX_PHONES:
        raise PhonesError(f"phones has {len(rows)} rows, expected 1 to {MAX_PHONES}")
    seen: set[str] = set()
    for i, row in enumerate(rows):
        phone = from_plain(Phone, row, f"phones[{i}].")
        if phone.name in seen:
            raise PhonesError(f"phones[{i}].name: {shown(phone.name)} stands twice")
        seen.add(phone.name)
        yield phone


def with_own(phones: tuple[Phone, ...], own: tuple[Phone, ...]) -> tuple[Phone, ...]:
    """A table with rows of another one added; a row of the same name is replaced, in its place."""
    by_name = {phone.name: phone for phone in own}
    kept = [by_name.pop(phone.name, phone) for phone in phones]
    return (*kept, *by_name.values())
