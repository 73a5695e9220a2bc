"""Set before anything imports triton: its kernels run in the interpreter, on a machine without a GPU."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
