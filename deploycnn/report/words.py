"""Numbers as people read them: one place, so that HTML, Markdown and terminal say the same."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence

MINUS = "\N{MINUS SIGN}"
#: Stands where there is no number.
NOTHING = "\N{EN DASH}"


def significant(value: float, digits: int = 3) -> str:
    """``value`` to ``digits`` significant digits, never in exponent form.

    >>> [significant(value) for value in (0.12345, 1.2345, 12.345, 1234.5, 0.0)]
    ['0.123', '1.23', '12.3', '1234', '0']
    """
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:.{decimals}f}"
    # Rounding up can add a digit (9.999 -> 10.00): then one decimal fewer is enough.
    if decimals and len(text.lstrip("-0.").replace(".", "")) > digits:
        text = f"{value:.{decimals - 1}f}"
    return text


def signed(value: float, decimals: int = 1) -> str:
    """``value`` with its sign, a real minus, and no sign on what rounds to zero.

    >>> [signed(value) for value in (0.52, -0.2, -0.01)]
    ['+0.5', '−0.2', '0.0']
    """
    text = f"{abs(value):.{decimals}f}"
    if float(text) == 0:
        return text
    return f"{'+' if value > 0 else MINUS}{text}"


def scaled(value: float, unit: str = "") -> str:
    """``value`` with a decimal prefix (k, M, G).

    >>> scaled(272474), scaled(1152000, "B"), scaled(820)
    ('272 k', '1.15 MB', '820')
    """
    for power, prefix in ((9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 0.9995 * 10**power:
            return f"{significant(value / 10**power)} {prefix}{unit}"
    return f"{value:g} {unit}".strip()


def milliseconds(value: float) -> str:
    """Latency with its unit."""
    return f"{significant(value)} ms"


def ratio(value: float) -> str:
    """A speed-up; finer where it is near 1.

    >>> ratio(1.043), ratio(3.14)
    ('1.04x', '3.1x')
    """
    return f"{_ratio_digits(value, value)}x"


def ratio_interval(value: float, low: float, high: float) -> str:
    """The interval of a speed-up, as fine as the speed-up itself."""
    return f"{_ratio_digits(low, value)}{NOTHING}{_ratio_digits(high, value)}"


def _ratio_digits(value: float, scale: float) -> str:
    return f"{value:.2f}" if scale < 2 else f"{value:.1f}" if scale < 100 else f"{value:.0f}"


def point_decimals(images: int | None) -> int:
    """Decimals that a percentage of ``images`` images deserves."""
    return 2 if images is not None and images >= 2000 else 1


def percent(fraction: float, decimals: int = 1) -> str:
    """A fraction as percent.

    >>> percent(0.8781)
    '87.8%'
    """
    return f"{100 * fraction:.{decimals}f}%"


def percent_interval(bounds: Sequence[float], decimals: int = 1) -> str:
    """An interval of fractions, in percent without the sign."""
    return f"{100 * bounds[0]:.{decimals}f}{NOTHING}{100 * bounds[1]:.{decimals}f}"


def change(drop: float, decimals: int = 1) -> str:
    """A drop as what it did to accuracy, in percentage points: a drop of 0.002 is "−0.2"."""
    return signed(-100 * drop, decimals)


def change_interval(drop_bounds: Sequence[float], decimals: int = 1) -> str:
    """The interval of a drop, as the interval of the change."""
    return f"{change(drop_bounds[1], decimals)} … {change(drop_bounds[0], decimals)}"


def points(fraction: float) -> str:
    """A fraction in percentage points.

    >>> points(0.01), points(0.005)
    ('1 point', '0.5 points')
    """
    value = f"{100 * fraction:g}"
    return f"{value} point{'' if value == '1' else 's'}"


def plural(count: int, noun: str) -> str:
    """``count`` and ``noun``.

    >>> plural(1, "thread"), plural(2, "thread")
    ('1 thread', '2 threads')
    """
    return f"{count} {noun}{'' if count == 1 else 's'}"


def flat(value: object) -> str:
    """A value from a record on one line."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        text = f"{value:.4g}"
        # 99.999 percent are not 100.
        return (
            f"{value:g}"
            if float(text).is_integer() and not value.is_integer() and abs(value) < 1000
            else text
        )
    if value is None:
        return NOTHING
    if isinstance(value, dict):
        return ", ".join(f"{key}: {flat(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(flat(item) for item in value)
    return str(value)


def duration(seconds: float) -> str:
    """Seconds as people say them.

    >>> [duration(value) for value in (0.04, 7.25, 75, 3700)]
    ['0.0 s', '7.2 s', '1 min 15 s', '1 h 02 min']
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    if seconds < 3599.5:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"


def clean(text: object) -> str:
    """``text`` on one line, without control or formatting characters: safe to print wherever it came from."""
    spaced = "".join(" " if char.isspace() else char for char in str(text))
    kept = (char for char in spaced if unicodedata.category(char) not in {"Cc", "Cf", "Cs"})
    return " ".join("".join(kept).split())


def cut(text: str, width: int) -> str:
    """``text``, cut to ``width`` characters with an ellipsis.

    >>> cut("pruned_int8", 8)
    'pruned_…'
    """
    return text if len(text) <= width else f"{text[: max(0, width - 1)]}…"
