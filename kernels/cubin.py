"""A model compiled for NVIDIA GPUs: files that C and C++ programs launch without Python (`kernels/cuda`).

`model.febm-cuda` holds everything. Little-endian; a header of 176 bytes, then the rest, each part from a multiple of
64 bytes on, zeros between them:

    byte  type        what
    0     char[8]     "FEBMCUDA"
    8     u32         format version: 1
    12    u32         bytes of the header: 176
    16    u64         bytes of the file
    24    u32[4]      D features, L noise levels, default level, K kernels
    40    u32         1: the model has a threshold, 0: it has none
    44    f32         the threshold (0 where there is none)
    48    u64[2]      where the weights begin, and their bytes: to be copied to the GPU as they are, to an aligned place
    64    u64[2]      where the feature names begin, and their bytes: UTF-8, each ended by a zero byte
    80    u64[2]      where f32[2][D] begin, marker and imputation, and where the K kernels do, as below
    96    char[16]    precision, filled up with zeros
    112   u8[32]      digest of the bundle it was made from (`Bundle.digest`)
    144   u8[32]      SHA-256 over the file without these 32 bytes

A kernel is 96 bytes, and its parameters, in the order of the launch, are u64[2] each: kind and value.

    0     u32[4]      compute capability (90), 1 where no other GPU runs it, 1 where it has a score, events of a program
    16    u32[4]      threads, bytes of shared memory, programs on a multiprocessor, P parameters
    32    u64[3]      where the P parameters begin, where the cubin begins, its bytes
    56    char[40]    name, filled up with zeros

`launch.h` says of the kernels the same as C, for programs that take the cubins out of the file by themselves.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from ebm.bundle import Bundle
from ebm.command import whole_file
from ebm.events import DataError
from kernels.febm import febm_bytes
from kernels.packing import pack
from kernels.tiles import Tile, tiles_for

MAGIC = b"FEBMCUDA"
FORMAT_VERSION = 1
HEADER = struct.Struct("<8sIIQ5If6Q16s32s32s")
KERNEL = struct.Struct("<8I3Q40s")
PARAMETER = struct.Struct("<2Q")
_DIGEST_BYTES = 32
MODEL, LAUNCH = "model.febm-cuda", "launch.h"
ARCHITECTURES = (80, 86, 87, 89, 90, 100, 103, 120, 121)
# What the compiler finds in its environment: line numbers would triple the file.
ENVIRONMENT = {"TRITON_DISABLE_LINE_INFO": "1"}


class Kind(IntEnum):
    """What a parameter of the kernel is. Its value is of a CONSTANT the bits, of WEIGHTS an offset in bytes, of SCRATCH
    the bytes of a program (several such parameters lie one after the other), else 0. FLAG may be NULL at the launch."""

    CONSTANT, WEIGHTS, X, ENERGY, SCORE, SCRATCH, EVENTS, LEVEL, FLAG = range(9)


# What is known at the launch alone. Pointers that are not named here are weights, in the order of `launch.WEIGHTS`.
_AT_LAUNCH = {"x": Kind.X, "energy": Kind.ENERGY, "score": Kind.SCORE, "flag": Kind.FLAG, "n": Kind.EVENTS,
              "first_level": Kind.LEVEL}
_BYTES = {"*fp32": 4, "*fp16": 2, "*bf16": 2}


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel, and how it is launched."""

    cc: int
    exact: bool  # architecture-specific code, as sm_90a
    with_score: bool
    tile: Tile
    shared: int
    parameters: tuple[tuple[Kind, int], ...]
    name: str
    cubin: bytes


def compile_kernel(bundle: Bundle, cc: int, tile: Tile, with_score: bool, precision: str,
                   weights: Iterable[int]) -> Kernel:
    """Energy, or energy and score, at one level, and flags where the model has a threshold.

    `weights` are the offsets of the arrays of `launch.load`.
    """
    from kernels.triton_kernel import compile_for, padded

    a = bundle.architecture
    made = compile_for(cc, features=a.input_dim, hidden=a.hidden_dim, layers=a.n_layers, with_score=with_score,
                       flagged=bundle.threshold is not None, precision=precision, tile=tile)
    m, ptx = made.metadata, made.asm["ptx"]
    if m.num_ctas != 1 or m.launch_cooperative_grid or m.launch_pdl or m.global_scratch_size or m.profile_scratch_size:
        raise RuntimeError(f"the kernel for sm_{cc} needs a cluster, a cooperative launch or scratch memory of Triton")
    types = {name: t for name, t in made.src.signature.items() if t != "constexpr"}
    threshold = 0.0 if bundle.threshold is None else bundle.threshold.energy
    buffer = tile.block_m * max(padded(a.input_dim), padded(a.hidden_dim))
    scratch = {"scratch": (3 + a.n_layers if with_score else 3) * buffer, "wide": 2 * buffer}
    known = ({name: (kind, 0) for name, kind in _AT_LAUNCH.items()}
             | {name: (Kind.SCRATCH, n * _BYTES[types[name]]) for name, n in scratch.items() if name in types}
             | {"b_out": (Kind.CONSTANT, int(bundle.tensors["b_out"].view("<u4")[0])), "levels": (Kind.CONSTANT, 1),
                "threshold": (Kind.CONSTANT, int(np.array(threshold, "<f4").view("<u4")))})
    return Kernel(cc, bool(re.search(r"^\.target sm_\d+a", ptx, re.M)), with_score, tile, m.shared,
                  _parameters(types, ptx, known, weights), m.name, made.asm["cubin"])


def _parameters(types: dict[str, str], ptx: str, known: dict[str, tuple[Kind, int]],
                weights: Iterable[int]) -> tuple[tuple[Kind, int], ...]:
    """In the order of Triton's signature, with NULL for the pointers to its own scratch memory that Triton appends."""
    pointers = [name for name, t in types.items() if name not in known and t.startswith("*")]
    known = known | {name: (Kind.WEIGHTS, offset) for name, offset in zip(pointers, weights, strict=True)}
    if unknown := types.keys() - known.keys():
        raise RuntimeError(f"nothing is known of the kernel's parameters {', '.join(sorted(unknown))}")
    bits = re.findall(r"^\s*\.param \.[a-z](\d+) ", ptx[ptx.index(".entry"):].partition("{")[0], re.M)
    expected = ["64" if t.startswith("*") else "32" for t in types.values()]
    appended = bits[len(expected):]
    if bits[:len(expected)] != expected or set(appended) - {"64"}:
        raise RuntimeError(f"the compiled kernel takes parameters of {bits} bits, expected {expected} and pointers")
    return (*(known[name] for name in types), *[(Kind.CONSTANT, 0)] * len(appended))


def cubin_files(bundle: Bundle, architectures: Iterable[int] = ARCHITECTURES,
                precision: str = "fp32") -> dict[str, bytes]:
    """File name -> content. Needs TRITON_INTERPRET unset when triton is imported."""
    architectures = sorted(set(architectures))
    if not architectures or not set(architectures) <= set(ARCHITECTURES):
        raise DataError(f"architectures are {architectures}, expected some of {', '.join(map(str, ARCHITECTURES))}")
    febm_bytes(bundle)  # refuses a model that packed files cannot express
    if find_spec("triton") is None:
        raise RuntimeError("triton is not installed, which compiles the kernels: pip install 'triton>=3.6,<3.10'")
    import torch
    import triton

    from kernels.launch import load
    from kernels.triton_kernel import INPUT_PRECISION, fused

    if precision not in INPUT_PRECISION:
        raise DataError(f"precision is {precision!r}, expected {', '.join(map(repr, INPUT_PRECISION))}")
    if not isinstance(fused, triton.JITFunction):
        raise RuntimeError("TRITON_INTERPRET is set, and the interpreter compiles nothing: unset it")

    body, kernels = _Body(), []
    places = [body.add(a.contiguous().flatten().view(torch.uint8).numpy().tobytes())
              for a in load(bundle, True, "cpu", precision)]
    weights = places[0], body.end - places[0]
    for cc in architectures:
        for tile in tiles_for(cc, precision):
            kernels += [compile_kernel(bundle, cc, tile, with_score, precision, [at - places[0] for at in places])
                        for with_score in (False, True)]
    records = []
    for k in kernels:
        parameters = b"".join(PARAMETER.pack(*p) for p in k.parameters)
        records.append((k.cc, k.exact, k.with_score, k.tile.block_m, 32 * k.tile.num_warps, k.shared,
                        k.tile.programs_per_sm, len(k.parameters), body.add(parameters), body.add(k.cubin),
                        len(k.cubin), k.name.encode()))
    table = body.add(b"".join(KERNEL.pack(*r) for r in records))
    q, names = pack(bundle).preprocessing, b"".join(name.encode() + b"\0" for name in bundle.schema.features)
    missing = body.add(np.stack([q.marker, q.impute]).astype("<f4").tobytes())
    at_names, t = body.add(names), bundle.threshold
    header = HEADER.pack(
        MAGIC, FORMAT_VERSION, HEADER.size, body.end, bundle.architecture.input_dim, bundle.architecture.n_sigmas,
        bundle.default_level, len(kernels), t is not None, t.energy if t else 0, *weights, at_names, len(names),
        missing, table, precision.encode(), bytes.fromhex(bundle.digest), bytes(_DIGEST_BYTES),
    )[:-_DIGEST_BYTES]
    content = header + hashlib.sha256(header + body.content).digest() + body.content
    return {MODEL: content, LAUNCH: _launch_header(bundle, precision, kernels, records, weights).encode()}


class _Body:
    """What follows the header."""

    def __init__(self) -> None:
        self.content = bytearray()

    @property
    def end(self) -> int:
        return HEADER.size + len(self.content)

    def add(self, part: bytes) -> int:
        """Where it begins in the file."""
        self.content += bytes(-self.end % 64)
        self.content += part
        return self.end - len(part)


def _launch_header(bundle: Bundle, precision: str, kernels: list[Kernel], records: list[tuple],
                   weights: tuple[int, int]) -> str:
    def parameters(k: Kernel) -> str:
        return ", ".join(f"{{FEBM_{kind.name}, {value:#x}}}" for kind, value in k.parameters)

    return "\n".join([
        f"/* How the kernels in {MODEL} are launched: model {bundle.digest[:12]}, {precision}.",
        " *", " * grid = min((n + block_m - 1) / block_m, programs_per_sm * multiprocessors), block = threads.", " *",
        " * The value of a FEBM_CONSTANT is its bits, of FEBM_WEIGHTS an offset into the weights, of FEBM_SCRATCH the",
        " * bytes of scratch memory of one program. */",
        f"enum {{ {', '.join(f'FEBM_{kind.name}' for kind in Kind)} }};",
        f"enum {{ febm_weights_at = {weights[0]}, febm_weights_bytes = {weights[1]} }};",
        "struct febm_parameter {", "  int kind;", "  unsigned long long value;", "};",
        *(f"static const struct febm_parameter febm_parameters_{i}[] = {{{parameters(k)}}};"
          for i, k in enumerate(kernels)),
        "static const struct {", "  const char *name;", "  const struct febm_parameter *parameters;",
        "  int cc, exact, with_score, block_m, threads, shared_bytes, programs_per_sm, n_parameters;",
        "  long long parameters_at, cubin_at, cubin_bytes;", "} febm_kernels[] = {",
        *(f'  {{"{k.name}", febm_parameters_{i}, {", ".join(str(int(v)) for v in record[:-1])}}},'
          for i, (k, record) in enumerate(zip(kernels, records))), "};", ""])


def check_out(out: Path) -> None:
    """DataError where `write_cubin` would not write; call it before the long work."""
    if out.exists() and (not out.is_dir() or {p.name for p in out.iterdir()} - {MODEL, LAUNCH}):
        raise DataError(f"{out} exists and is no directory of compiled models: nothing is written there")
    place = out if out.exists() else out.resolve().parent
    if not os.access(place, os.W_OK | os.X_OK):
        raise DataError(f"{out} cannot be written: {place} is no directory that can be written to")


def write_cubin(bundle: Bundle, out: str | Path, architectures: Iterable[int] = ARCHITECTURES,
                precision: str = "fp32") -> dict[str, int]:
    """Compile and write, each file whole or not at all, replacing those that are there; name -> size in bytes."""
    out = Path(out)
    check_out(out)
    files = cubin_files(bundle, architectures, precision)
    try:
        out.mkdir(exist_ok=True)
        for name, content in files.items():
            with whole_file(out / name) as f:
                f.write(content)
    except OSError as e:
        raise DataError(f"{out} cannot be written: {e.strerror}") from None
    return {name: len(content) for name, content in files.items()}
