PARTS: int
SUMS: int
TILE: int
UNIT: int

def local_block(
    x: int,
    tokens: int,
    embedding: int,
    broadcast: int,
    segments: int,
    weights: list[int],
    hidden: int,
    local: int,
    narrow: int,
    wide: int,
    first: int,
    last: int,
    channels: int,
    taps: int,
    wide_dilation: int,
    is_bf16: bool,
    threads: int,
) -> None: ...
def local_block_backward(
    x: int,
    tokens: int,
    embedding: int,
    broadcast: int,
    segments: int,
    weights: list[int],
    narrow: int,
    wide: int,
    d_local: int,
    d_hidden: int,
    results: list[int],
    d_x: int,
    d_tables: int,
    sums: int,
    gap: int,
    rows: int,
    channels: int,
    taps: int,
    wide_dilation: int,
    is_bf16: bool,
    threads: int,
) -> None: ...
def attention(
    local: int,
    key_weight: int,
    value_weight: int,
    query: int,
    starts: int,
    lengths: int,
    slots: int,
    proteins: int,
    partials: int,
    weights: int,
    channels: int,
    heads: int,
    d_key: int,
    d_value: int,
    is_bf16: bool,
    threads: int,
) -> None: ...
def attention_finish(
    partials: int, slots: int, proteins: int, out: int, denominators: int, heads: int, d_value: int
) -> None: ...
def attention_backward(
    local: int,
    keys_values_weight: int,
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
    channels: int,
    heads: int,
    d_key: int,
    d_value: int,
    is_bf16: bool,
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
def shares_threads() -> bool: ...
def use_instruction_set(name: str) -> None: ...
