"""Builds the C++ kernels with CMake (through scikit-build-core) beside the Python packages.

FUSED_EBM_NATIVE=0 leaves them out; then `python -m kernels` says that the native backend is not built.
"""

import os
import shutil
import sys

from setuptools import setup

if os.environ.get("FUSED_EBM_NATIVE", "1") == "0":
    setup()
else:
    compiler = os.environ.get("CXX", "g++").split()[0]
    if shutil.which(compiler) is None:
        sys.exit(
            f"fused-ebm: the C++ compiler {compiler!r} was not found. Install one (Debian: apt-get install g++) and "
            "try again, or set FUSED_EBM_NATIVE=0 to install without the native backend."
        )
    from scikit_build_core.setuptools.wrapper import setup as setup_with_cmake

    setup_with_cmake(cmake_source_dir=".")
