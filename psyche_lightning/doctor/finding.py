"""One result of an examination: what was found, whether it is good, and what to do if it is not."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Verdict(Enum):
    """How good a finding is."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"
    UNKNOWN = "not measured"


@dataclass(frozen=True)
class Finding:
    """One row of the report.

    Attributes:
        area: the group of the row, such as ``"machine"``.
        name: what was examined.
        value: what was found, for people.
        verdict: how good it is.
        advice: what to do; empty if there is nothing to do.
    """

    area: str
    name: str
    value: str
    verdict: Verdict = Verdict.OK
    advice: str = ""

    def as_json(self) -> dict[str, str]:
        """The row as JSON."""
        return {
            "area": self.area,
            "name": self.name,
            "value": self.value,
            "verdict": self.verdict.value,
            "advice": self.advice,
        }


def count(number: float) -> str:
    """A number for people: ``1.78 M``."""
    return scaled(number, ("", " K", " M", " B", " T"))


def size(number: float) -> str:
    """Bytes for people: ``5.14 kB``."""
    return scaled(number, (" B", " kB", " MB", " GB", " TB"))


def duration(seconds: float) -> str:
    """A time for people: ``3.1 ms``, ``2.5 h``."""
    for unit, length in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} s" if seconds >= 0.9995 else f"{1e3 * seconds:.3g} ms"


def speed(rate: float) -> str:
    """Bytes and bits a second for people: ``2.5 MB/s (20 Mbit/s)``."""
    return f"{size(rate)}/s ({scaled(8 * rate, (' bit', ' kbit', ' Mbit', ' Gbit'))}/s)"


def scaled(number: float, units: tuple[str, ...]) -> str:
    """A number with three digits and the unit that fits; units are a factor of thousand apart."""
    for unit in units[:-1]:
        if number < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}{units[-1]}"
