"""Build the artefacts of a model: one directory, whole or not at all, with a manifest and its proof."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from ebm.bundle import Bundle
from export import manifest
from export.publish import publish
from export.score_graph import Options


class Target(NamedTuple):
    """A way out of Python. Functions are "module:function", imported when they are first asked for."""

    export: str
    needs: tuple[str, ...] = ()
    why_not: str | None = None  # gives the reason why it cannot be built here, or None


_ONNX = ("onnx", "onnxscript", "onnxruntime")
TARGETS = {
    "torchscript": Target("export.to_torchscript:export"),
    "onnx": Target("export.to_onnx:export", _ONNX),
    "aot-inductor": Target("export.to_aot_inductor:export", why_not="export.to_aot_inductor:why_not"),
    "tensorrt": Target("export.to_tensorrt:export", _ONNX[:2], "export.to_tensorrt:why_not"),
    "triton": Target("export.triton_repository:export"),
}


def build(model: Bundle | str | Path, to: Iterable[str], out: str | Path, *, outputs: Sequence[str] | None = None,
          level: int | None = None, preprocess: bool = True, batch_max: int = 65_536,
          extra: Mapping[str, Mapping[str, Any]] | None = None, command: str | None = None,
          progress: Callable[[str], None] = lambda target: None) -> Path:
    """Export a model to the targets `to` (names from TARGETS) in the new directory `out`, and give its path.

    `outputs`, `level`, `preprocess` and `batch_max` are those of `Options.of`; `extra` has more arguments for single
    targets, as {"triton": {"backend": "onnxruntime"}}. `command` is what the manifest calls the origin, and
    `progress` is told each target before its work.

    An `out` that exists is refused, but for "triton" alone: there a version is added to the repository in it. Nothing
    is left behind by an export that fails. Raises ValueError on wrong arguments, DataError on a model that cannot be
    read or an `out` that exists, RuntimeError on a target that cannot be built here and on an artefact that does not
    agree with float64.
    """
    to, out, extra = [to] if isinstance(to, str) else list(dict.fromkeys(to)), Path(out), extra or {}
    if not to or set(to) - TARGETS.keys():
        raise ValueError(f"targets are {', '.join(to) or 'none'}, expected some of {', '.join(TARGETS)}")
    if foreign := sorted(extra.keys() - set(to)):
        raise ValueError(f"arguments for {', '.join(foreign)}, which is no target of this export")
    for target, given in extra.items():
        _, _, _, *known = inspect.signature(_named(TARGETS[target].export)).parameters  # after model, place and options
        if unknown := sorted(given.keys() - set(known)):
            raise ValueError(f"{target} takes no {', '.join(unknown)}")
    for target in to:
        if reason := why_not(target):
            raise RuntimeError(f"target {target!r} cannot be built: {reason}")
    bundle = model if isinstance(model, Bundle) else Bundle.load(model)
    options = Options.of(bundle, outputs=outputs, level=level, preprocess=preprocess, batch_max=batch_max)
    command = command or f"build({'Bundle' if bundle is model else Path(model).name}, {to}, {out.name})"

    def write(target: str, directory: Path) -> dict:
        progress(target)
        its_own = {"command": command} if target == "triton" else {}
        return _named(TARGETS[target].export)(bundle, directory, options, **its_own, **extra.get(target, {}))

    if to == ["triton"] and (out / "triton").is_dir():
        write("triton", out)
        return out
    with publish(out) as directory:
        manifest.write(directory, bundle, options, {target: write(target, directory) for target in to}, command)
    return out


def why_not(target: str) -> str | None:
    """The reason why a target of TARGETS cannot be built here, or None."""
    t = TARGETS[target]
    if missing := [module for module in t.needs if find_spec(module) is None]:
        return f"{' and '.join(missing)} not installed: pip install {' '.join(missing)}"
    return _named(t.why_not)() if t.why_not else None


def _named(lazy: str) -> Callable:
    module, name = lazy.split(":")
    return getattr(importlib.import_module(module), name)
