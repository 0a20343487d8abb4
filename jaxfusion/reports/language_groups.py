"""Groups of languages whose mean accuracies the papers report."""

from collections.abc import Iterable

# Classes 0 to 3 of Joshi et al. (arXiv:2004.09095, "The State and Fate of Linguistic Diversity")
# among the tasks' languages; ISO 639-1 and, for SIB-200 and Belebele, 639-3.
LOW_RESOURCE = (
    "am as asm ben bg bn bul el ell est et guj gu hat ht id ind ka kan kk kn lo mal mar ml mr mya "
    "my ne npi or ory pa pan qu quy si sin sw swh ta tam te tel th tha ur urd uz yo yor"
)
# Indo-Aryan and Dravidian languages.
INDIC = (
    "as asm ben bn gu guj hi hin kan kn mal mar ml mr ne npi or ory pa pan si sin ta tam te tel ur "
    "urd"
)


def standard_groups(languages: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The groups `low-resource`, `Indic` and `all`, without those of fewer than two languages or
    equal to `all`."""
    languages = tuple(languages)
    groups = {
        name: tuple(x for x in languages if x.split("_")[0] in codes.split())
        for name, codes in (("low-resource", LOW_RESOURCE), ("Indic", INDIC))
    }
    proper = {name: names for name, names in groups.items() if 1 < len(names) < len(languages)}
    return {**proper, **({"all": languages} if len(languages) > 1 else {})}
