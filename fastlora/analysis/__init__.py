"""What an adapter has learned: the questions of section 7 of the LoRA paper, as plain functions on tensors.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv:2106.09685), section 7, appendices G, H.
"""

from fastlora.analysis.projections import Amplification, amplification, top_singular_values
from fastlora.analysis.spectra import effective_rank, spectrum
from fastlora.analysis.subspaces import delta_cosine, random_similarity, row_similarity, subspace_similarity

__all__ = [
    "Amplification",
    "amplification",
    "delta_cosine",
    "effective_rank",
    "random_similarity",
    "row_similarity",
    "spectrum",
    "subspace_similarity",
    "top_singular_values",
]
