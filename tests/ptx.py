"""Runs the PTX of kernels/quant.py without a GPU, by the letter of the PTX manual: for tl.inline_asm_elementwise
under Triton's interpreter, where a vector has one element for every thread of a program."""

import ctypes
import functools

import numpy
import torch
import triton.language as tl

GROUP, QUAD = numpy.arange(32) // 4, numpy.arange(32) % 4
SHARED = numpy.empty(1 << 14, dtype=numpy.uint32)            # words of the program that runs


def words_at(address, count):
    """A view of memory: shared where the address has 32 bits, NaN until something is written there."""
    if isinstance(address, numpy.uint32):
        return SHARED[address // 4:address // 4 + count]
    return numpy.frombuffer((ctypes.c_uint32 * count).from_address(int(address)), numpy.uint32)


def halves(words, kind):
    """[..., 2] float32: low and high half of each word."""
    if kind.startswith("bf16"):
        return numpy.stack([words << 16, words & 0xffff0000], -1).astype(numpy.uint32).view(numpy.float32)
    return numpy.ascontiguousarray(words[..., None]).view(numpy.float16).astype(numpy.float32)


def words_of(pairs, kind):
    """The words whose halves are these numbers, float64, rounded."""
    bits = torch.from_numpy(pairs).to(torch.bfloat16 if kind.startswith("bf16") else torch.float16).view(torch.uint16)
    return numpy.ascontiguousarray(bits.numpy()).view(numpy.uint32)[..., 0]


def mma(kind, depth, a, b, c):
    """c + a @ b of every 32 threads: fragments as the manual's figures of m16n8k8 and m16n8k16 place them."""
    warps = len(c[0]) // 32
    A, B, C = (numpy.zeros((warps, *shape), numpy.float32) for shape in ((16, depth), (depth, 8), (16, 8)))
    for i, register in enumerate(a):
        low, high = halves(register, kind).reshape(warps, 32, 2).transpose(2, 0, 1)
        A[:, GROUP + 8 * (i % 2), 2 * QUAD + 8 * (i // 2)] = low
        A[:, GROUP + 8 * (i % 2), 2 * QUAD + 1 + 8 * (i // 2)] = high
    for i, register in enumerate(b):
        low, high = halves(register, kind).reshape(warps, 32, 2).transpose(2, 0, 1)
        B[:, 2 * QUAD + 8 * i, GROUP], B[:, 2 * QUAD + 1 + 8 * i, GROUP] = low, high
    places = [(slice(None), GROUP + 8 * (i // 2), 2 * QUAD + i % 2) for i in range(4)]
    for register, place in zip(c, places, strict=True):
        C[place] = register.reshape(warps, 32)
    C += A @ B
    return [C[place].reshape(-1) for place in places]


def mma8(a, b, c):
    """The same for whole numbers: a unsigned, b signed, 32 columns, four of them in a register."""
    warps = len(c[0]) // 32
    A, B, C = (numpy.zeros((warps, *shape), numpy.int64) for shape in ((16, 32), (32, 8), (16, 8)))
    for i in range(4):                                       # the byte of a register
        for k, register in enumerate(a):
            A[:, GROUP + 8 * (k % 2), 4 * QUAD + i + 16 * (k // 2)] = (register >> 8 * i & 255).reshape(warps, 32)
        for k, register in enumerate(b):
            value = (register >> 8 * i & 255).astype(numpy.uint8).view(numpy.int8)
            B[:, 4 * QUAD + i + 16 * k, GROUP] = value.reshape(warps, 32)
    places = [(slice(None), GROUP + 8 * (i // 2), 2 * QUAD + i % 2) for i in range(4)]
    for register, place in zip(c, places, strict=True):
        C[place] = numpy.asarray(register).view(numpy.int32).reshape(warps, 32)
    C += A @ B
    return [C[place].reshape(-1).astype(numpy.int32).view(numpy.uint32) for place in places]


@functools.cache
def parsed(asm):
    """[(instruction, its operands)]."""
    lines = [line.strip().partition(" ") for line in asm.strip().strip("{}").split(";")]
    return [(name, rest.replace("{", " ").replace("}", " ").replace(",", " ").split()) for name, _, rest in lines
            if name not in ("", ".reg")]


def run(asm, inputs, outputs):
    """Values of $0 .. $(outputs - 1); inputs: those behind them, numpy arrays of one shape."""
    held = {f"${outputs + i}": x for i, x in enumerate(inputs)}

    def read(name):
        return held[name] if name in held else numpy.uint32(int(name, 0))

    for name, parts in parsed(asm):
        if name == ".shared":
            held["queue"] = numpy.uint32(0)
            SHARED.fill(0x7fc07fc0)
        elif name == "mov.b32" and len(parts) == 3:
            held[parts[0]], held[parts[1]] = read(parts[2]) & 0xffff, read(parts[2]) >> 16
        elif name in ("mov.b32", "mov.u32"):
            held[parts[0]] = read(parts[1])
        elif name == "add.u32":
            held[parts[0]] = read(parts[1]) + read(parts[2])
        elif name == "shr.u32":
            held[parts[0]] = read(parts[1]) >> read(parts[2])
        elif name == "lop3.b32":                             # a sum over the table's rows (a, b, c) that are 1
            a, b, c = (read(x) for x in parts[1:4])
            held[parts[0]] = sum((a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
                                 for k in range(8) if int(parts[4], 0) >> k & 1)
        elif name in ("fma.rn.bf16x2", "fma.rn.f16x2"):
            kind = name.split(".")[2]
            a, b, c = (halves(numpy.broadcast_to(read(x), numpy.shape(read(parts[1]))), kind) for x in parts[1:])
            held[parts[0]] = words_of(a.astype(numpy.float64) * b + c, kind)
        elif name == "prmt.b32":                             # a nibble of the table picks a byte of the two words
            both = [(read(x) >> 8 * i & 255).astype(numpy.uint32) for x in parts[1:3] for i in range(4)]
            held[parts[0]] = sum(both[int(parts[3], 0) >> 4 * i & 7] << 8 * i for i in range(4)).astype(numpy.uint32)
        elif name == "dp4a.s32.s32":
            a, b, c = (numpy.atleast_1d(read(x)).astype(numpy.uint32) for x in parts[1:])
            bytes_of = [[(x >> 8 * i & 255).astype(numpy.uint8).view(numpy.int8).astype(numpy.int32)
                         for i in range(4)] for x in (a, b)]
            total = c.view(numpy.int32) + sum(x * y for x, y in zip(*bytes_of, strict=True))
            held[parts[0]] = total.astype(numpy.int32).view(numpy.uint32)
        elif name == "cvt.f32.f16":
            held[parts[0]] = halves(read(parts[1]), "f16")[..., 0]
        elif name.startswith(("ld.global", "ld.shared")):
            *into, address = parts
            found = numpy.stack([words_at(at, len(into)) for at in read(address.strip("[]"))])
            found = found.view(numpy.float32 if name.endswith("f32") else numpy.uint32)
            held.update(zip(into, found.T.copy(), strict=True))
        elif name.startswith("st.shared.v"):
            for i, to in enumerate(read(parts[0].strip("[]"))):
                words_at(to, len(parts) - 1)[:] = [read(x)[i:i + 1].view(numpy.uint32)[0] for x in parts[1:]]
        elif name == "shfl.sync.idx.b32":
            held[parts[0]] = read(parts[1])[numpy.arange(len(read(parts[1]))) // 32 * 32 + read(parts[2])]
        elif name.startswith("cp.async."):                   # at once; waiting is for nothing
            for to, at, size in zip(*(read(parts[i].strip("[]")) for i in (0, 1, 3)), strict=True):
                words_at(to, int(parts[2]) // 4)[:] = words_at(at, int(parts[2]) // 4) if size else 0
        elif name == "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32":
            a, b, c = ([read(x) for x in xs] for xs in (parts[4:8], parts[8:10], parts[-4:]))
            held.update(zip(parts[:4], mma8(a, b, c), strict=True))
        elif name.startswith("mma.sync.aligned.m16n8k"):
            depth, count = (16, 4) if "k16" in name else (8, 2)
            a, b, c = parts[4:4 + count], parts[4 + count:4 + count + count // 2], parts[-4:]
            found = mma(name.split(".")[6], depth, *([read(x) for x in xs] for xs in (a, b, c)))
            held.update(zip(parts[:4], found, strict=True))
        else:
            raise AssertionError(f"no PTX known as {name!r}")
    return [numpy.broadcast_to(held[f"${i}"], inputs[0].shape) for i in range(outputs)]


def inline_asm_elementwise(asm, constraints, args, dtype, is_pure, pack):
    """In place of Triton's. A vector's elements are the threads'."""
    if not args:                                             # a fence, or cp.async's
        return None
    several, dtypes = isinstance(dtype, tuple), dtype if isinstance(dtype, tuple) else (dtype,)
    inputs = [x.handle.data for x in args]
    inputs = [x.view(numpy.uint32) if x.dtype == numpy.int32 else x for x in inputs]
    found = [tl.tensor(type(args[0].handle)(x if t == tl.float32 else x.astype(numpy.uint32).view(numpy.int32), t),
                       tl.block_type(t, list(args[0].shape)))
             for x, t in zip(run(asm, inputs, len(dtypes)), dtypes, strict=True)]
    return tuple(found) if several else found[0]
