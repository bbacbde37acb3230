TILE: int

def merge_convolutions(
    x: int,
    narrow: int,
    wide: int,
    broadcast: int,
    segments: int,
    gamma: int,
    beta: int,
    out: int,
    rows: int,
    channels: int,
    is_bf16: bool,
    threads: int,
) -> None: ...
def merge_dense(
    hidden: int,
    dense: int,
    segments: int,
    gamma: int,
    beta: int,
    out: int,
    rows: int,
    channels: int,
    is_bf16: bool,
    threads: int,
) -> None: ...
def attention(
    keys_values: int,
    query: int,
    starts: int,
    lengths: int,
    slots: int,
    proteins: int,
    partials: int,
    weights: int,
    first_row: int,
    rows: int,
    heads: int,
    d_key: int,
    d_value: int,
    is_bf16: bool,
    threads: int,
) -> None: ...
def attention_finish(
    partials: int, slots: int, proteins: int, out: int, denominators: int, heads: int, d_value: int
) -> None: ...
def instruction_set() -> str: ...
def shares_threads() -> bool: ...
def use_instruction_set(name: str) -> None: ...
