"""How much a benchmark run does."""

from dataclasses import dataclass, field, replace
from typing import Any

from proteinbert_fast.config import ProteinBertConfig

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Settings:
    """Sizes of a run; the defaults make the published tables.

    Attributes:
        dtypes: to compute in.
        rounds: timings of each case.
        proteins: most proteins of the sample.
        fasta: a file to sample them from; the proteins that come with the package when None.
        config: sizes of the model.
        checked: proteins whose results are compared with the float64 reference.
        batch_tokens: padded tokens per batch that other implementations may choose from; 1 runs proteins singly.
        compile: whether to run competitors under torch.compile too.
        tokenizer_bytes: residues in memory for the tokenizer.
        memory_lengths: residues of the proteins whose peak memory is measured.
        corpus_entries: of the UniRef XML that corpora are built from.
        matrix_sizes: of the square matrices whose products show the machine's matrix rate; a convolution of as many
            rows as the smallest does too.
        copied_bytes: of the array whose copying shows its copy rate; more than fits into caches.
        rate_seconds: in which the peak of the instruction set is measured.
        is_quick: sizes are too small for numbers worth keeping; reports say so.
    """

    dtypes: tuple[str, ...] = DTYPES
    rounds: int = 7
    proteins: int = 100
    fasta: str | None = None
    config: ProteinBertConfig = field(default_factory=ProteinBertConfig)
    checked: int = 6
    batch_tokens: tuple[int, ...] = (1, 2048, 4096, 16_384)
    compile: bool = True
    tokenizer_bytes: int = 32_000_000
    memory_lengths: tuple[int, ...] = (34_350, 125_000, 250_000, 500_000, 1_000_000)
    corpus_entries: int = 30_000
    matrix_sizes: tuple[int, ...] = (2048, 4096)
    copied_bytes: int = 1 << 27
    rate_seconds: float = 2.0
    is_quick: bool = False

    def quick(self) -> "Settings":
        """The same in a minute or two, to see that everything works."""
        return replace(
            self,
            rounds=min(self.rounds, 3),
            proteins=min(self.proteins, 20),
            checked=3,
            batch_tokens=(4096,),
            compile=False,
            tokenizer_bytes=4_000_000,
            memory_lengths=(10_000, 34_350, 70_000),
            corpus_entries=3000,
            matrix_sizes=(2048,),
            rate_seconds=0.5,
            is_quick=True,
        )

    def to_dict(self) -> dict[str, Any]:
        """For reports."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return values | {"config": self.config.to_dict()}
