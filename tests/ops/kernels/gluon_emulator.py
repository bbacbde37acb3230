"""Runs a Gluon kernel for Hopper on the CPU: the operations that the local block's kernels use, and no others.

Triton's interpreter does not know Gluon. Here a kernel's own Python code runs with these operations in place of
Gluon's, one program after another, on tiles that are torch tensors. Shared memory is bytes at addresses, and layouts
are the real ones. What the hardware leaves open goes the worst way it may, so that a mistake shows every time:

- shared memory begins as NaN, and a copy's target is NaN from its start until somebody has rightly waited for it;
- products read their operands both when they are issued and when they are waited for, and these must be equal;
- products see what threads wrote only after a fence and then a barrier;
- a barrier's wait for a phase that is past returns at once, for one that cannot end it raises.

Not emulated: the threads of a program are one. The barriers that Gluon's compiler places between threads by itself
(before a refill after products of other warps, for one) are in the machine code and not in the kernel: the compile gate
looks for them there. Nor are registers' layouts: the compiler refuses those that do not fit.
"""

import types
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.core import constexpr

from proteinbert_fast.ops.kernels.local_block_hopper import thread_barrier

SHARED_MEMORY = 227 * 1024
WRITTEN, FENCED, VISIBLE = 2, 1, 0  # of numbers in shared memory, to products


class EmulationError(AssertionError):
    """The kernel does what the hardware does not allow or promise."""


def require(condition: bool, complaint: str) -> None:
    if not condition:
        raise EmulationError(complaint)


class Pointer:
    """Addresses of elements of an array, of which the elements from ``origin`` on are really there."""

    def __init__(self, values: Tensor, offset: Tensor | None = None, origin: int = 0) -> None:
        self.values, self.origin = values.view(-1), origin
        self.dtype = types.SimpleNamespace(element_ty=values.dtype)
        self.offset = torch.zeros((), dtype=torch.int64) if offset is None else offset

    def __add__(self, more: Tensor | int) -> "Pointer":
        return Pointer(self.values, self.offset + torch.as_tensor(more).to(torch.int64), self.origin)

    def where(self, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Indices, and which are wanted; an index that is wanted and outside raises."""
        index = self.offset - self.origin
        index, mask = torch.broadcast_tensors(index, torch.tensor(True) if mask is None else mask)
        wrong = mask & ((index < 0) | (index >= len(self.values)))
        require(not wrong.any(), "an address outside its array")
        return index.where(mask, 0), mask


class Descriptor:
    """A matrix in global memory that the copy engine moves in tiles."""

    def __init__(self, values: Tensor, block: list[int], layout: gl.NVMMASharedLayout) -> None:
        self.values, self.block, self.layout, self.dtype = values, block, layout, values.dtype


class Barrier:
    """An mbarrier: a phase ends when all have arrived and all bytes are there."""

    def __init__(self, count: int) -> None:
        self.count = self.missing = count
        self.parity = self.bytes = 0
        self.copies: list[Callable[[], int]] = []

    def end_phase_if_complete(self) -> None:
        if self.missing == 0 and self.bytes == 0:
            self.parity ^= 1
            self.missing = self.count


def _relative(layout: Any, shape: tuple[int, ...], origin: tuple[int, ...]) -> Tensor:
    """Elements from the start of a view's buffer to each of its places."""
    ranges = [torch.arange(start, start + n) for start, n in zip(origin, shape, strict=True)]
    places = torch.meshgrid(*ranges, indexing="ij")
    if isinstance(layout, gl.SharedLinearLayout):
        offset = torch.zeros(shape, dtype=torch.int64)
        for bit, basis in enumerate(layout.offset_bases):
            ((dim, value),) = ((d, v) for d, v in enumerate(basis) if v)
            offset += ((places[dim] & value) != 0).long() << bit
        return offset
    if isinstance(layout, gl.NVMMASharedLayout):
        row, column = places
        per_line = layout.swizzle_byte_width * 8 // layout.element_bitwidth
        return column // per_line * (shape[0] * per_line) + row * per_line + column % per_line
    require(layout.max_phase == 1, "not emulated: this layout")
    offset = torch.zeros(shape, dtype=torch.int64)
    for place, n in zip(places, shape, strict=True):
        offset = offset * n + place
    return offset


@lru_cache(maxsize=512)
def _places(start: int, layout: Any, shape: tuple[int, ...], origin: tuple[int, ...]) -> tuple[Tensor, int, int]:
    """Index of each element of a view among all of shared memory's 16-bit words; the first and the last of them."""
    where = start // 2 + _relative(layout, shape, origin)
    if isinstance(layout, gl.NVMMASharedLayout) and layout.swizzle_byte_width == 128:
        # The hardware mixes address bits: 16-byte unit within a line of 128 bytes, by the line's number.
        where = where ^ ((where >> 6 & 7) << 3)
    return where, int(where.min()), int(where.max())


class Shared:
    """A view of shared memory."""

    def __init__(self, program: "Program", start: int, dtype: torch.dtype, shape: Iterable[int], layout: Any,
                 origin: tuple[int, ...] | None = None) -> None:  # fmt: skip
        self.program, self.start, self.dtype, self.layout = program, start, dtype, layout
        self.shape = tuple(shape)
        self.origin = origin or (0,) * len(self.shape)

    def index(self, i: int) -> "Shared":
        stride = self.dtype.itemsize
        for n in self.shape[1:]:
            stride *= n
        return Shared(self.program, self.start + int(i) * stride, self.dtype, self.shape[1:], self.layout)

    def _reinterpret(self, dtype: torch.dtype, shape: list[int], layout: Any) -> "Shared":
        return Shared(self.program, self.start, dtype, shape, layout)

    def slice(self, start: int, length: int, dim: int = 0) -> "Shared":
        require(start % length == 0, "a slice must begin at a multiple of its length")
        shape, origin = list(self.shape), list(self.origin)
        shape[dim], origin[dim] = length, origin[dim] + start
        return Shared(self.program, self.start, self.dtype, shape, self.layout, tuple(origin))

    def places(self) -> Tensor:
        """Index of each element among all of shared memory's 16-bit words."""
        where, first, last = _places(self.start, self.layout, self.shape, self.origin)
        require(first >= 0 and last < self.program.used // 2, "a view outside what is allocated")
        return where

    def read(self) -> Tensor:
        where = self.places()
        require(not self.program.in_flight[where].any(), "a read of memory that a copy is still writing")
        return self.program.memory[where].view(self.dtype)

    def write(self, values: Tensor) -> None:
        self.program.memory[self.places()] = values.contiguous().view(torch.int16)

    def load(self, layout: Any) -> Tensor:
        return self.read().clone()

    def store(self, values: Tensor) -> None:
        require(values.shape == self.shape and values.dtype == self.dtype, "a store of another shape or dtype")
        where = self.places()
        require(not self.program.in_flight[where].any(), "a write to memory that a copy is still writing")
        self.write(values)
        self.program.seen[where] = WRITTEN


class Pending:
    """An accumulator that products are still to be added to."""

    def __init__(self, total: Tensor) -> None:
        self.total = total


class Program:
    """One program: its shared memory, and all that is under way in it."""

    def __init__(self, number: int, warps: int) -> None:
        self.number, self.warps = number, warps
        self.memory = torch.full((SHARED_MEMORY // 2,), -1, dtype=torch.int16)  # NaN in bfloat16 and float16
        self.in_flight = torch.zeros(len(self.memory), dtype=torch.bool)
        self.seen = torch.zeros(len(self.memory), dtype=torch.uint8)
        self.used = 0
        self.barriers: dict[int, Barrier] = {}
        self.copies: list[Callable[[], int]] = []
        self.groups: list[list[Callable[[], int]]] = []
        self.products: list[tuple[Shared, Shared, Pending, Tensor, Tensor]] = []  # and the operands at their start

    def start_copy(self, target: Shared, values: Tensor, state: int) -> Callable[[], int]:
        """The target's old contents are lost now; the new ones are there when what is returned has been called."""
        where = target.places()
        require(not self.in_flight[where].any(), "two copies to one place")
        self.memory[where] = -1
        self.in_flight[where] = True

        def arrive() -> int:
            self.in_flight[where] = False
            target.write(values)
            self.seen[where] = state
            return values.numel() * values.element_size()

        return arrive

    def operand(self, view: Shared) -> Tensor:
        require(bool((self.seen[view.places()] == VISIBLE).all()), "products of what no fence and barrier came after")
        return view.read()

    def end_products(self, left: int) -> None:
        while len(self.products) > left:
            a, b, pending, a_then, b_then = self.products.pop(0)
            a_now, b_now = self.operand(a), self.operand(b)
            for now, then in ((a_now, a_then), (b_now, b_then)):
                require(torch.equal(now.view(torch.int16), then.view(torch.int16)), "operands changed under products")
            a_now, b_now = a_now.double(), b_now.double()
            # 16 channels at a time, as the instruction has them; in float64, so that a row's sum does not depend on its
            # place in the tile.
            for k in range(0, len(b_now), 16):
                pending.total = (pending.total.double() + a_now[:, k : k + 16] @ b_now[k : k + 16]).float()

    def end(self) -> None:
        require(not self.products and not self.copies and not self.groups, "products or copies that nobody waited for")
        require(not any(b.copies for b in self.barriers.values()), "the program ended before its copies")
        require(not self.barriers, "a barrier that was not invalidated")


def check_matrix_descriptor(view: Shared) -> None:
    """A view of planes is what the hardware reads: 8 x 8 blocks at two strides, from a multiple of 16 bytes."""
    at = view.places() * 2
    if at[1, 0] - at[0, 0] == 2:  # turned: (channels, rows)
        at = at.T
    start, by_rows, by_channels = int(at[0, 0]), int(at[8, 0] - at[0, 0]), int(at[0, 8] - at[0, 0])
    require(start % 16 == 0 and by_rows % 16 == 0 and by_channels % 16 == 0, "an operand off a multiple of 16 bytes")
    rows, channels = (torch.arange(n) for n in at.shape)
    expected = start + (rows // 8 * by_rows + rows % 8 * 16)[:, None] + channels // 8 * by_channels + channels % 8 * 2
    require(torch.equal(at, expected), "an operand that no matrix descriptor describes")


class Gluon:
    """The operations, for one program."""

    def __init__(self, program: Program) -> None:
        p = program
        none = types.SimpleNamespace

        def load(pointer: Pointer, mask: Tensor | None = None, other: float = 0.0) -> Tensor:
            require(mask is None or other is not None, "masked elements are undefined")
            index, mask = pointer.where(mask)
            return pointer.values[index].where(mask, other).to(pointer.values.dtype)

        def store(pointer: Pointer, values: Tensor, mask: Tensor | None = None) -> None:
            require(values.dtype == pointer.values.dtype, "a store of another dtype")
            index, mask = pointer.where(mask)
            pointer.values[index[mask]] = values.expand(mask.shape)[mask]

        def allocate(dtype: torch.dtype, shape: list[int], layout: Any) -> Shared:
            start = -(-p.used // 1024) * 1024
            size = dtype.itemsize
            for n in shape:
                size *= n
            p.used = start + size
            require(p.used <= SHARED_MEMORY, "more shared memory than the chip has")
            return Shared(p, start, dtype, shape, layout)

        def arange(start: int, end: int, layout: Any) -> Tensor:
            return torch.arange(start, end, dtype=torch.int32)

        def barrier() -> None:
            p.seen[p.seen == FENCED] = VISIBLE

        def fence(cluster: bool = False) -> None:
            p.seen[p.seen == WRITTEN] = FENCED

        def pair(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any, Any], Tensor]:
            return lambda a, b: function(torch.as_tensor(a), torch.as_tensor(b))

        def assembly(text: str, constraints: str, values: list[Tensor], **_: Any) -> Tensor:
            require(text == "mov.b32 $0, $1;", "not emulated: this assembly")
            return values[0]

        layouts = ("SharedLinearLayout", "SwizzledSharedLayout", "SliceLayout", "NVMMADistributedLayout",
                   "DistributedLinearLayout")  # fmt: skip
        self.language = none(
            **{name: getattr(gl, name) for name in layouts},
            float32=torch.float32, float16=torch.float16, int32=torch.int32, int64=torch.int64, constexpr=gl.constexpr,
            program_id=lambda axis: torch.tensor(p.number, dtype=torch.int32), num_warps=lambda: p.warps,
            static_range=range, allocate_shared_memory=allocate, arange=arange, load=load, store=store,
            zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
            sum=lambda x, axis: x.sum(axis), rsqrt=torch.rsqrt, where=lambda c, a, b: torch.where(c, a, b),
            maximum=pair(torch.maximum), minimum=pair(torch.minimum),
        )  # fmt: skip
        self.triton = none(
            abs=torch.abs, exp2=torch.exp2, minimum=pair(torch.fmin), inline_asm_elementwise=assembly,
            constexpr=constexpr,
        )  # fmt: skip

        def copy(target: Shared, source: Pointer, mask: Tensor | None = None) -> None:
            require(target.shape == tuple(source.offset.shape), "a copy between shapes")
            index, mask = source.where(mask)
            p.copies.append(p.start_copy(target, source.values[index].where(mask, 0), WRITTEN))

        def commit_group() -> None:
            p.groups.append(p.copies)
            p.copies = []

        def wait_group(left: int) -> None:
            while len(p.groups) > left:
                for arrive in p.groups.pop(0):
                    arrive()

        self.async_copy = none(async_copy_global_to_shared=copy, commit_group=commit_group, wait_group=wait_group)

        def at(view: Shared) -> Barrier:
            require(view.start in p.barriers, "a barrier that was not initialised")
            return p.barriers[view.start]

        def init(view: Shared, count: int) -> None:
            p.barriers[view.start] = Barrier(count)
            p.seen[view.start // 2] = WRITTEN

        def expect(view: Shared, bytes: int, pred: bool = True) -> None:
            if pred:
                require(at(view).missing > 0, "more arrivals than the barrier counts")
                at(view).missing -= 1
                at(view).bytes += bytes

        def wait(view: Shared, phase: int) -> None:
            found = at(view)
            if found.parity != phase:
                return
            while found.copies:
                found.bytes -= found.copies.pop(0)()
            found.end_phase_if_complete()
            require(found.parity != phase, "a wait that never ends")

        def invalidate(view: Shared) -> None:
            require(not at(view).copies, "a barrier invalidated before its copies")
            del p.barriers[view.start]

        self.mbarrier = none(init=init, expect=expect, wait=wait, invalidate=invalidate,
                             MBarrierLayout=lambda: gl.SwizzledSharedLayout(1, 1, 1, [0]))  # fmt: skip

        def bulk_copy(source: Descriptor, coordinates: list[int], barrier: Shared, target: Shared, pred: bool = True):
            if not pred:
                return
            require(int(p.seen[barrier.start // 2]) != WRITTEN, "no fence between a barrier and the copy engine")
            row, column = map(int, coordinates)
            require(list(target.shape) == source.block, "a copy between shapes")
            found = source.values[max(row, 0) : row + source.block[0], column : column + source.block[1]]
            require(list(found.shape) == source.block, "a tile of weights outside their array")
            at(barrier).copies.append(p.start_copy(target, found.clone(), VISIBLE))

        self.tma = none(async_copy_global_to_shared=bulk_copy)

        def product(a: Shared, b: Shared, total: Tensor | Pending, is_async: bool = False) -> Pending:
            require(is_async, "not emulated: products that wait")
            pending = total if isinstance(total, Pending) else Pending(total)
            for operand in (a, b):
                if isinstance(operand.layout, gl.SharedLinearLayout):
                    check_matrix_descriptor(operand)
                else:
                    require(operand.start % 1024 == 0, "a swizzled operand off a multiple of 1,024 bytes")
            p.products.append((a, b, pending, p.operand(a), p.operand(b)))
            return pending

        def product_wait(num_outstanding: int, deps: list[Tensor | Pending]) -> Any:
            p.end_products(num_outstanding)
            under_way = [pending for _, _, pending, *_ in p.products]
            totals = [
                t.total if isinstance(t, Pending) and not any(t is pending for pending in under_way) else t
                for t in deps
            ]
            return totals[0] if len(totals) == 1 else totals

        self.replaced = {
            id(gl): self.language, id(async_copy): self.async_copy, id(mbarrier): self.mbarrier, id(tma): self.tma,
            id(thread_barrier): barrier, id(fence_async_shared): fence, id(warpgroup_mma): product,
            id(warpgroup_mma_wait): product_wait,
        }  # fmt: skip


def _in_python(jitted: Any, gluon: Gluon, done: dict[int, Any]) -> Callable[..., Any]:
    """A kernel's function, or one that it calls, with the emulated operations in its reach."""
    if id(jitted) not in done:
        function = jitted.fn
        scope: dict[str, Any] = {}
        done[id(jitted)] = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__)
        for name, value in function.__globals__.items():
            if id(value) in gluon.replaced:
                scope[name] = gluon.replaced[id(value)]
            elif name == "tl":
                scope[name] = gluon.triton
            elif isinstance(value, constexpr):
                scope[name] = value.value
            elif hasattr(value, "fn") and hasattr(value, "arg_names"):
                scope[name] = _in_python(value, gluon, done)
            elif callable(value) or name == "__builtins__":
                scope[name] = value
    found: Callable[..., Any] = done[id(jitted)]
    return found


def run(kernel: Any, programs: Iterable[int], *arguments: Any, warps: int, **constants: Any) -> None:
    """Runs the given programs of a kernel, one after another.

    Args:
        kernel: made by ``gluon.jit``.
        programs: their numbers.
        arguments: numbers, tensors or Pointers, and tensor descriptors.
        warps: of a program.
        constants: compile-time arguments.
    """
    arguments = tuple(
        Pointer(a)
        if isinstance(a, Tensor)
        else Descriptor(a.base, a.block_shape, a.layout)
        if hasattr(a, "base")
        else a
        for a in arguments
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # Tiles are small: threads would wait for each other most of the time.
    try:
        for number in programs:
            program = Program(number, warps)
            _in_python(kernel, Gluon(program), {})(*arguments, **constants)
            program.end()
    finally:
        torch.set_num_threads(threads)


class Emulated:
    """Stands in for a kernel where it is launched: ``kernel[grid](...)``."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return partial(self._launch, range(*grid))

    def _launch(self, programs: range, *arguments: Any, num_warps: int, maxnreg: int | None, **constants: Any) -> None:
        run(self.kernel, programs, *arguments, warps=num_warps, **constants)
