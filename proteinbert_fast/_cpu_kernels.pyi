PARTS: int
SUMS: int
TILE: int
UNIT: int

class Packed: ...

def pack_local_block(
    weights: list[int],
    embedding: int,
    channels: int,
    taps: int,
    wide_dilation: int,
    backward: bool,
    is_bf16: bool,
    threads: int,
) -> Packed: ...
def pack_attention(
    key_weight: int,
    value_weight: int,
    channels: int,
    heads: int,
    d_key: int,
    d_value: int,
    backward: bool,
    is_bf16: bool,
    threads: int,
) -> Packed: ...
def pack_global_block(weights: list[int], width: int, is_bf16: bool, threads: int) -> Packed: ...
def pack_conditioning(
    query: int,
    broadcast: int,
    broadcast_bias: int,
    width: int,
    keys: int,
    channels: int,
    is_bf16: bool,
    threads: int,
) -> Packed: ...
def gelu(x: int, out: int, n: int, is_bf16: bool) -> None: ...
def global_block(
    packed: Packed, state: int, pooled: int, hidden: int, out: int, proteins: int, threads: int
) -> None: ...
def conditioning(packed: Packed, state: int, query: int, broadcast: int, proteins: int, threads: int) -> None: ...
def local_block(
    packed: Packed,
    x: int,
    tokens: int,
    broadcast: int,
    segments: int,
    hidden: int,
    local: int,
    narrow: int,
    wide: int,
    starts: int,
    lengths: int,
    proteins: int,
    gap: int,
    rows: int,
    threads: int,
) -> None: ...
def local_block_backward(
    packed: Packed,
    x: int,
    tokens: int,
    broadcast: int,
    segments: int,
    narrow: int,
    wide: int,
    d_local: int,
    d_hidden: int,
    results: list[int],
    d_x: int,
    d_tables: int,
    sums: int,
    starts: int,
    lengths: int,
    proteins: int,
    gap: int,
    rows: int,
    threads: int,
) -> None: ...
def attention(
    packed: Packed,
    local: int,
    query: int,
    starts: int,
    lengths: int,
    proteins: int,
    pooled: int,
    denominators: int,
    weights: int,
    threads: int,
) -> None: ...
def run_blocks(
    blocks: list[tuple[Packed, Packed, Packed, Packed | None]],
    tokens: int,
    segments: int,
    starts: int,
    lengths: int,
    proteins: int,
    gap: int,
    rows: int,
    state: int,
    query: int,
    broadcast: int,
    local: int,
    other: int,
    out: int,
    threads: int,
) -> None: ...
def attention_backward(
    packed: Packed,
    local: int,
    query: int,
    starts: int,
    lengths: int,
    slots: int,
    proteins: int,
    denominators: int,
    pooled: int,
    d_pooled: int,
    d_local: int,
    d_query: int,
    d_weights: int,
    threads: int,
) -> None: ...
def weight_gradient(
    x: int,
    gradient: int,
    out: int,
    first: int,
    last: int,
    inputs: int,
    columns: int,
    taps: int,
    dilation: int,
    is_bf16: bool,
    threads: int,
) -> None: ...
def protein_sums(
    rows: int, starts: int, lengths: int, proteins: int, out: int, channels: int, is_bf16: bool, threads: int
) -> None: ...
def instruction_set() -> str: ...
def instruction_sets() -> list[str]: ...
def amx_failure() -> str: ...
def shares_threads() -> bool: ...
def rates(is_bf16: bool, seconds: float, threads: int) -> tuple[float, float]: ...
def use_instruction_set(name: str) -> None: ...
