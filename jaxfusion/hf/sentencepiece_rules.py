"""Rules of SentencePiece that a `tokenizers` backend needs to be told."""

from collections.abc import Mapping

SPACE = "▁"


def merges_by_score(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """The merges of SentencePiece's BPE: those that give the piece of the highest score first."""
    merges = [
        (-score, cut, piece[:cut], piece[cut:])
        for piece, score in scores.items() for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return [(left, right) for _, _, left, right in sorted(merges)]
