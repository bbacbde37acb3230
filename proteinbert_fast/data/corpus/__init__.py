"""The pretraining corpus: built from public files, read by record or as a stream, checked."""

from proteinbert_fast.data.corpus.build import Built, build_corpus
from proteinbert_fast.data.corpus.check import verify_corpus
from proteinbert_fast.data.corpus.dense import write_dense
from proteinbert_fast.data.corpus.reader import Corpus, CorpusRecord, CorpusSlice, CorpusTerm

__all__ = [
    "Built",
    "Corpus",
    "CorpusRecord",
    "CorpusSlice",
    "CorpusTerm",
    "build_corpus",
    "verify_corpus",
    "write_dense",
]
