TILE: int

def local_block(
    x: int,
    broadcast: int,
    segments: int,
    weights: list[int],
    hidden: int,
    local: int,
    first: int,
    last: int,
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
def instruction_set() -> str: ...
def shares_threads() -> bool: ...
def use_instruction_set(name: str) -> None: ...
