"""FASTA in, embeddings out: in memory, or as an HDF5 file that an interrupted run can be resumed to."""

from proteinbert_fast.embedding.api import Embeddings, EmbedSummary, embed

__all__ = ["EmbedSummary", "Embeddings", "embed"]
