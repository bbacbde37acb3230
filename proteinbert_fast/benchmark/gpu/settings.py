"""How much a GPU report does."""

from dataclasses import dataclass, field, fields, replace
from typing import Any

from proteinbert_fast.benchmark.gpu.precision import PRECISIONS
from proteinbert_fast.config import ProteinBertConfig

# Residues of the proteins of a batch: none, one, primes, around tiles of 64 and 128 rows and spans of 512.
CHECK_LENGTHS = (
    (0,),
    (1, 1),
    (13, 0, 7),
    (61, 62, 63),
    (125, 126, 127),
    (300, 1, 509),
    (510, 511, 1030),
    tuple(range(0, 300, 7)),
    (100_003,),
)


@dataclass(frozen=True)
class GpuSettings:
    """Sizes of a run; the defaults are for a GPU of 80 GB and make the published tables in under eight minutes.

    Attributes:
        config: sizes of the model.
        precisions: names of those to compute in.
        rounds: timings of each case.
        timed_seconds: a timing repeats a case until it lasts about so long.
        limit_seconds: a case that would start later than this after the beginning is left out, and says so.
        check_lengths: residues of the proteins of each batch that kernels are checked on.
        model_lengths: the same, of the one batch that the whole model is checked on.
        apart: whether each precision is checked in a process of its own, all at once: kernels are compiled side by
            side, and one that crashes takes nothing else with it.
        apart_seconds: such a process may take.
        matrix_sizes: of the square matrices whose products show the device's matrix rate, in 16 bits.
        copied_bytes: of the buffer whose copying shows the memory rate.
        cached_bytes: of the buffer that stays in the L2 cache.
        proteins: most different proteins of the sample.
        longest: residues that proteins of the sample are cut to; None for none.
        forward_tokens: of the sample of real proteins, at least; the proteins are repeated.
        batch_rows: rows per batch that ours may choose from.
        padded_tokens: padded tokens per batch that others may choose from.
        compile_options: of torch.compile.
        compile_seconds: compiling may take; decides for how many shapes.
        compile_shapes: most shapes.
        compiled_tokens: padded tokens of each of them.
        lengths: residues of single proteins.
        largest: residues of the largest piece, tried one after the other until one fits.
        exact_residues: of the longest protein that is compared with the float64 reference.
        compared_residues: of the longest that is compared with ours in float32; longer ones must repeat themselves.
        period: residues after which long proteins repeat themselves.
        latency_residues: of the protein whose latency is measured.
        latency_calls: single calls that are timed.
        kernel_tokens: of the batch on which kernels are timed alone.
        training_rows: of the batch of a training step.
        training_compile_before: seconds after which no other code is compiled for training any more.
        is_trial: sizes and clocks are not for numbers worth keeping; reports say so.
    """

    config: ProteinBertConfig = field(default_factory=ProteinBertConfig)
    precisions: tuple[str, ...] = tuple(PRECISIONS)
    rounds: int = 7
    timed_seconds: float = 0.02
    limit_seconds: float = 450.0
    check_lengths: tuple[tuple[int, ...], ...] = CHECK_LENGTHS
    model_lengths: tuple[int, ...] = (0, 1, 7, 62, 131, 350, 509, 1030, 20_011)
    apart: bool = True
    apart_seconds: float = 220.0
    matrix_sizes: tuple[int, ...] = (4096, 8192, 16_384)
    copied_bytes: int = 1 << 31
    cached_bytes: int = 1 << 24
    proteins: int = 400
    longest: int | None = None
    forward_tokens: int = 2_000_000
    batch_rows: tuple[int, ...] = (131_072, 524_288, 2_200_000)
    padded_tokens: tuple[int, ...] = (65_536, 262_144, 1_048_576)
    compile_options: dict[str, Any] = field(
        # Without CUDA graphs of its own: they overwrite results that are still to be checked. A graph of the whole
        # pass is captured instead, in a row of its own.
        default_factory=lambda: {"mode": "max-autotune-no-cudagraphs", "fullgraph": True}
    )
    compile_seconds: float = 200.0
    compile_shapes: int = 8
    compiled_tokens: int = 262_144
    lengths: tuple[int, ...] = (1_000, 10_000, 100_000, 1_000_000, 10_000_000)
    largest: tuple[int, ...] = (30_000_000, 20_000_000, 10_000_000)
    exact_residues: int = 100_000
    compared_residues: int = 1_000_000
    period: int = 34_350
    latency_residues: int = 350
    latency_calls: int = 300
    kernel_tokens: int = 1_000_000
    training_rows: int = 524_288
    training_compile_before: float = 240.0
    is_trial: bool = False

    def tiny(self) -> "GpuSettings":
        """Everything once in the smallest sizes, for Triton's interpreter on a CPU."""
        return replace(
            self,
            config=ProteinBertConfig(
                n_annotations=30, d_local=32, d_global=32, n_blocks=1, n_heads=2, d_key=16, kernel_size=3
            ),
            rounds=1,
            timed_seconds=0.0,
            limit_seconds=600.0,
            check_lengths=((13, 0, 7), (61,)),
            model_lengths=(0, 22),
            apart=False,
            matrix_sizes=(64,),
            copied_bytes=1 << 16,
            cached_bytes=1 << 14,
            proteins=3,
            longest=30,
            forward_tokens=90,
            batch_rows=(60, 2048),
            padded_tokens=(60, 2048),
            compile_options={"backend": "eager", "fullgraph": True},
            compile_shapes=2,
            compiled_tokens=60,
            lengths=(40, 130),
            largest=(150, 145),
            exact_residues=45,
            compared_residues=140,
            period=50,
            latency_residues=10,
            latency_calls=2,
            kernel_tokens=60,
            training_rows=120,
            is_trial=True,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for reports and other processes."""
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"config": self.config.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "GpuSettings":
        """The settings that `to_dict` gave, also after JSON has made lists of its tuples."""
        plain = {name: _tuples(value) for name, value in values.items()}
        return cls(**plain | {"config": ProteinBertConfig.from_dict(values["config"])})


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value
