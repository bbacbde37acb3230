"""The pretraining corpus: built from public files, read by record or as a stream, checked."""

from proteinbert_fast.data.corpus.build import Built, build_corpus

__all__ = ["Built", "build_corpus"]
