"""An LLM's language-agnostic and language-specific subspaces (Lens, arXiv:2410.04407, section 3.1;
the factorisation is LSAR's, Xie et al., EMNLP 2022).

Computed in float64 with NumPy on the host: the matrices are small, and in float32 the default
cutoff of a pseudo-inverse drops language directions.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from jaxfusion.errors import InputError

SAME = 1e-12  # relative: means that differ by less count as equal


@dataclass(frozen=True)
class Subspaces:
    """The factorisation `M ≈ m_a 1ᵀ + M_s Γᵀ` of the language means of one layer.

    Attributes:
      agnostic: `m_a` [E], shared by all languages; orthogonal to `specific`.
      specific: `M_s` [E r], orthonormal columns, in descending order of singular values.
      singular_values: [r], of the means without the shared part.
    """

    agnostic: Float[np.ndarray, "E"]
    specific: Float[np.ndarray, "E r"]
    singular_values: Float[np.ndarray, "r"]

    @property
    def direction(self) -> Float[np.ndarray, "E"]:
        """`m_a` normalised."""
        return self.agnostic / np.linalg.norm(self.agnostic)

    def onto_agnostic(self, x: Float[np.ndarray, "*N E"]) -> Float[np.ndarray, "*N E"]:
        """`P_a x`, the projection on `m_a`."""
        return (x @ self.direction)[..., None] * self.direction

    def onto_specific(self, x: Float[np.ndarray, "*N E"]) -> Float[np.ndarray, "*N E"]:
        """`P_s x = M_s M_sᵀ x`."""
        return x @ self.specific @ self.specific.T


def factorise(means: Float[np.ndarray, "K E"], rank: int | None = None) -> Subspaces:
    """The two subspaces of the means of K languages (arXiv:2410.04407, eq. 2 to 4).

        c = mean of the means;  U S Vᵀ = svd(M − c 1ᵀ);  M̂ = c 1ᵀ + U_r S_r V_rᵀ
        m_a = pinv(M̂)ᵀ 1 / ‖pinv(M̂)ᵀ 1‖²;  M_s = first r left singular vectors of M̂ − m_a 1ᵀ

    Args:
      means: of the hidden states of each language.
      rank: r; None: K − 1, at which `m_a` and `M_s` reproduce the means exactly.

    Raises:
      InputError: fewer than two languages, or a rank that is too high for their number or for
        means that are equal.
    """
    columns = np.asarray(means, np.float64).T  # [E K], as the paper writes it
    languages = columns.shape[1]
    if languages < 2:
        raise InputError(f"subspaces need at least two languages, got {languages}")
    rank = languages - 1 if rank is None else rank
    if not 1 <= rank <= languages - 1:
        raise InputError(f"the rank is {rank}, expected 1 to {languages - 1} with {languages} "
                         "languages")
    centre = columns.mean(axis=1, keepdims=True)
    u, s, vt = np.linalg.svd(columns - centre, full_matrices=False)
    low = centre + (u[:, :rank] * s[:rank]) @ vt[:rank]
    if s[rank - 1] <= SAME * np.linalg.norm(centre):
        raise InputError(f"the means of {languages} languages differ in fewer than {rank} "
                         "directions; set the rank lower, or remove languages with the same "
                         "prompts")
    # pinv(low) at its exact rank r + 1: a cutoff by size mistakes rounding noise for a direction
    # if one dimension dominates, as in wide LLMs.
    u, s, vt = np.linalg.svd(low, full_matrices=False)
    u, s, vt = u[:, : rank + 1], s[: rank + 1], vt[: rank + 1]
    agnostic = (u / s) @ vt @ np.ones(languages)
    agnostic = agnostic / (agnostic @ agnostic)
    u, s, _ = np.linalg.svd(low - agnostic[:, None], full_matrices=False)
    return Subspaces(agnostic, u[:, :rank], s[:rank])


def directions(means: Float[np.ndarray, "K E"]) -> int:
    """The rank of the means, at least 1."""
    means = np.asarray(means, np.float64)
    centre = means.mean(axis=0)
    values = np.linalg.svd(means - centre, compute_uv=False)
    return max(1, int(np.sum(values[: len(means) - 1] > SAME * np.linalg.norm(centre))))


def displacements(
    subspaces: Subspaces, means: Float[np.ndarray, "K E"], central: int
) -> Float[np.ndarray, "K E"]:
    """`Δ_k`: each language's displacement from the central one in the specific subspace; 0 for the
    central one itself."""
    inside = subspaces.onto_specific(np.asarray(means, np.float64))
    return inside - inside[central]
