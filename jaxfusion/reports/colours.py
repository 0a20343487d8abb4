"""One colour for each method, the same in every picture, table and page.

All can be told from a white page and from a dark one: their relative luminance is 0.13 to 0.30, a
contrast of 3 or more on both.
"""

import colorsys
import re
from collections.abc import Iterable
from zlib import crc32

GREY, BLUE, ORANGE, GREEN, VIOLET = "#858585", "#3b82c4", "#d9730d", "#2f9e5b", "#9467c8"
OTHERS = ("#d64550", "#1f9aa0", "#d65ba6", "#8a8f1e", "#a9714b", "#6474e5", "#b3589b")
PALETTE = (BLUE, ORANGE, GREEN, VIOLET, *OTHERS)
# Methods of this project by name, without the number of a layer.
KNOWN = {
    "LLM alone": GREY, "LLM": GREY, "last": BLUE, "layer": ORANGE, "global_softmax": VIOLET,
    "transformer_softmax": GREEN, "steering": BLUE, "disentangle": VIOLET, "supervised": ORANGE,
    "Lens": GREEN,
}


def colours_of(names: Iterable[str]) -> dict[str, str]:
    """A colour for each name, no two alike.

    This project's methods have colours of their own. Any other name begins its search for a free
    one, among those of no method, at a place that depends on the name alone, so that it mostly has
    the same in every report.

    Returns:
      Name to `#rrggbb`, in the order of the names.
    """
    names = list(dict.fromkeys(names))
    found: dict[str, str] = {}
    for name in names:
        colour = KNOWN.get(re.sub(r"[ _]\d+$", "", name))
        if colour is not None and colour not in found.values():
            found[name] = colour
    rest = [name for name in names if name not in found]
    pool = list(OTHERS)
    if len(rest) > len(set(PALETTE) - set(found.values())):
        pool = [_hue(i / len(rest)) for i in range(len(rest))]
    for name in rest:
        first = crc32(name.encode()) % len(pool)
        found[name] = next(x for x in (*pool[first:], *pool[:first], *PALETTE)
                           if x not in found.values())
    return {name: found[name] for name in names}


def _hue(place: float) -> str:
    """A colour on the wheel, where the palette is too small."""
    red, green, blue = colorsys.hls_to_rgb(place, 0.45, 0.65)
    return "#" + "".join(f"{round(255 * x):02x}" for x in (red, green, blue))
