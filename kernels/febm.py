"""A packed model: one file that the C library opens without Python (`kernels/native/include/fused_ebm.h`).

Little-endian. A header of 224 bytes, then the arrays of `kernels.packing.Packed` as they are (the library packs
them for its instruction set when it opens the file), each from a multiple of 64 bytes on, zeros between them:

    byte  type        what
    0     char[8]     "FUSEDEBM"
    8     u32         format version: 1
    12    u32         bytes of the header: 224
    16    u64         bytes of the file
    24    u32[5]      D features, H hidden, n layers, L noise levels, default level
    44    u32         1: the model has a threshold, 0: it has none
    48    f32[2]      the threshold (0 where there is none), b_out
    56    u64[11]     where the arrays begin: w_in (H, D), b_in (L, H) = b_in + emb, w (n, H, H), b (n, H), w_out (H,),
                      marker, impute, scale, mean, inv_std (D,), all f32, and transform (D,), i32
    144   u64[2]      where the feature names begin, and their bytes: UTF-8, each ended by a zero byte
    160   u8[32]      digest of the bundle it was made from (`Bundle.digest`)
    192   u8[32]      SHA-256 over the file without these 32 bytes

A reader looks at the version before anything that follows it; a change that a reader of version 1 would not
understand takes a new version.
"""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import numpy as np

from ebm.bundle import Bundle
from ebm.command import whole_file
from ebm.events import DataError
from kernels.packing import pack

MAGIC = b"FUSEDEBM"
FORMAT_VERSION = 1
HEADER = struct.Struct("<8sIIQ5II2f11QQQ32s32s")
_DIGEST_BYTES = 32


def febm_bytes(bundle: Bundle) -> bytes:
    """The packed file of an energy model. ValueError where the format cannot say what the model says."""
    p = pack(bundle)
    t = bundle.threshold
    if t is not None and t.level != bundle.default_level:
        raise DataError(f"the threshold is of noise level {t.level}, the default level is {bundle.default_level}: "
                        "calibrate the model again")
    if t is not None and not np.isfinite(np.float32(t.energy)):
        raise DataError(f"the threshold is {t.energy}, expected a finite float32")
    names = b"".join(name.encode() + b"\0" for name in bundle.schema.features)
    if names.count(b"\0") != p.w_in.shape[1]:
        raise DataError("a feature name contains a zero byte, which ends a name in the packed file")

    q = p.preprocessing
    arrays = [np.ascontiguousarray(a, "<f4").tobytes() for a in
              (p.w_in, p.b_in, p.w, p.b, p.w_out, q.marker, q.impute, q.scale, q.mean, q.inv_std)]
    parts = [*arrays, np.ascontiguousarray(q.transform, "<i4").tobytes(), names]
    offsets, body = [], bytearray()
    for part in parts:
        body += bytes(-(HEADER.size + len(body)) % 64)
        offsets.append(HEADER.size + len(body))
        body += part

    hidden, features = p.w_in.shape
    header = HEADER.pack(
        MAGIC, FORMAT_VERSION, HEADER.size, HEADER.size + len(body), features, hidden, len(p.w), len(p.b_in),
        bundle.default_level, t is not None, t.energy if t else 0, p.b_out, *offsets, len(names),
        bytes.fromhex(bundle.digest), bytes(_DIGEST_BYTES),
    )[:-_DIGEST_BYTES]
    return header + hashlib.sha256(header + body).digest() + bytes(body)


def write_febm(bundle: Bundle, path: str | Path) -> int:
    """Write the packed file, whole or not at all, replacing a packed file that is there; its size in bytes."""
    path = Path(path)
    if path.exists() and not _is_febm(path):
        raise DataError(f"{path} exists and is no packed model: it is not overwritten")
    content = febm_bytes(bundle)
    try:
        with whole_file(path) as f:
            f.write(content)
    except OSError as e:
        raise DataError(f"{path} cannot be written: {e.strerror}") from None
    return len(content)


def _is_febm(path: Path) -> bool:
    if not path.is_file():
        return False
    with open(path, "rb") as f:
        return f.read(len(MAGIC)) == MAGIC
