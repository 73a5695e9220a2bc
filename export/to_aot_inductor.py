"""AOTInductor: a library compiled ahead of time for this kind of processor, in a .pt2 package."""

from __future__ import annotations

import platform
from pathlib import Path

from ebm.bundle import Bundle
from export.score_graph import Options, program, without_notices

FILE = "model.pt2"
MARCH = "x86-64-v3"  # AVX2 and FMA: without it, the instructions of the machine that compiled


def export(bundle: Bundle, directory: Path, options: Options) -> dict:
    """Write model.pt2 into `directory`; the entry of the manifest.

    Takes (batch, D) float32 with a free batch, on a CPU. On x86 it runs on every processor with AVX2.
    """
    from torch._inductor import aoti_compile_and_package

    x86 = platform.machine() == "x86_64"
    # Without dynamic threads, the number of threads of this process would be compiled in.
    config = {"cpp.dynamic_threads": True} | ({"cpp.march": MARCH, "cpp.simdlen": 256} if x86 else {})
    with without_notices():
        aoti_compile_and_package(program(bundle, options), package_path=str(directory / FILE), inductor_configs=config)
    return {"file": FILE, "machine": platform.machine(), "instructions": MARCH if x86 else "native"}


def why_not() -> str | None:
    """None where there is a C++ compiler, else the reason."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "there is no C++ compiler: install g++, or name one in the environment variable CXX"
    return None
