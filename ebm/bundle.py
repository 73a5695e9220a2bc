"""A model on disk: `model.safetensors` with the weights and `model.json` with everything else."""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from ebm.events import DataError, Schema
from ebm.preprocess import TRANSFORMS, Preprocessing
from ebm.threshold import ClassThresholds, Threshold

FORMAT = "fused-ebm bundle"
FORMAT_VERSION = 1
MAX_WIDTHS = {"input_dim": 256, "hidden_dim": 512, "n_layers": 8, "n_sigmas": 64, "latent_dim": 256}


@dataclass(frozen=True)
class Architecture:
    """Sizes of a network; `kind` is "energy", "score" or "autoencoder"."""

    kind: str
    input_dim: int
    hidden_dim: int = 256
    n_layers: int = 2
    n_sigmas: int = 10
    latent_dim: int = 8

    def __post_init__(self) -> None:
        if self.kind not in ("energy", "score", "autoencoder"):
            raise DataError(f"kind is {self.kind!r}, expected 'energy', 'score' or 'autoencoder'")
        for name, most in MAX_WIDTHS.items():
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= most:
                raise DataError(f"{name} is {value!r}, expected a whole number from 1 to {most}")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor."""
        d, h = self.input_dim, self.hidden_dim
        if self.kind == "autoencoder":
            widths = [d, 128, 64, self.latent_dim, 64, 128, d]
            layers = enumerate(itertools.pairwise(widths))
            return {k: v for i, (a, b) in layers for k, v in ((f"w.{i}", (b, a)), (f"b.{i}", (b,)))}
        shapes: dict[str, tuple[int, ...]] = {"w_in": (h, d), "b_in": (h,), "emb": (self.n_sigmas, h)}
        for i in range(self.n_layers):
            shapes |= {f"w.{i}": (h, h), f"b.{i}": (h,)}
        head = (h,) if self.kind == "energy" else (d, h)
        return shapes | {"w_out": head, "b_out": (1,) if self.kind == "energy" else (d,)}


@dataclass(frozen=True)
class Bundle:
    """A trained model: architecture, float32 tensors, noise levels, schema, preprocessing, threshold.

    `reports` has the physics report of every reduced precision that was compared with float64, by its name.
    `threshold` is the one that every backend and export applies; `class_thresholds` are applied to energies.
    `level_mean` and `level_std` (L,) are of each level's energies of background: only with them can levels be compared
    or combined (`ebm.scores`). `quantiles` are (share, energy) of the background that the threshold was calibrated on,
    rising (`ebm.folds.quantiles`). Models of earlier versions have neither.
    """

    architecture: Architecture
    tensors: dict[str, np.ndarray]
    sigmas: tuple[float, ...]
    default_level: int
    schema: Schema
    preprocessing: Preprocessing
    threshold: Threshold | None = None
    provenance: dict = field(default_factory=dict)
    reports: dict[str, dict] = field(default_factory=dict)
    class_thresholds: ClassThresholds | None = None
    level_mean: tuple[float, ...] = ()
    level_std: tuple[float, ...] = ()
    quantiles: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        a, s = self.architecture, np.asarray(self.sigmas)
        for name, width in (("schema", self.schema.n_features), ("preprocessing", self.preprocessing.n_features)):
            if width != a.input_dim:
                raise DataError(f"the {name} has {width} features, the architecture {a.input_dim}")
        if a.kind != "autoencoder" and (len(s) != a.n_sigmas or (s <= 0).any() or (np.diff(s) >= 0).any()):
            raise DataError(f"sigmas must be {a.n_sigmas} positive, descending numbers, given {self.sigmas}")
        if not 0 <= self.default_level < self.n_levels:
            raise DataError(f"default_level is {self.default_level}, expected 0 to {self.n_levels - 1}")
        expected = a.shapes()
        if missing := sorted(expected.keys() - self.tensors.keys()):
            raise DataError(f"tensors missing: {', '.join(missing)}")
        if foreign := sorted(self.tensors.keys() - expected.keys()):
            raise DataError(f"tensors that a {a.kind} model does not have: {', '.join(foreign)}")
        for name, shape in expected.items():
            t = self.tensors[name]
            if t.shape != shape or t.dtype != np.float32:
                raise DataError(f"tensor {name} is {t.dtype}{list(t.shape)}, expected float32{list(shape)}")
            if not np.isfinite(t).all():
                raise DataError(f"tensor {name} has values that are not finite")
        if not isinstance(self.reports, dict) or not all(isinstance(r, dict) for r in self.reports.values()):
            raise DataError(f"reports must be a dictionary of one dictionary per precision, given {self.reports!r}")
        means, stds = (np.asarray(v, dtype=float) for v in (self.level_mean, self.level_std))
        if not (len(means) == len(stds) and len(means) in (0, self.n_levels) and np.isfinite(means).all()
                and np.isfinite(stds).all() and (stds > 0).all()):
            raise DataError(f"level_mean and level_std must be {self.n_levels} numbers each, the latter positive, "
                            f"given {self.level_mean} and {self.level_std}")
        shares, energies = np.asarray(self.quantiles, dtype=float).reshape(-1, 2).T
        if not (np.isfinite(energies).all() and (np.diff(energies) >= 0).all()
                and (np.diff(shares, prepend=0, append=1) > 0).all()):
            raise DataError("quantiles must be pairs of a share between 0 and 1 and a finite energy, both rising, "
                            f"given {self.quantiles}")
        if self.class_thresholds and self.class_thresholds.feature not in self.schema.features:
            raise DataError(f"class thresholds of {self.class_thresholds.feature!r}, which is no feature of the schema")

    @property
    def n_levels(self) -> int:
        return 1 if self.architecture.kind == "autoencoder" else self.architecture.n_sigmas

    @property
    def digest(self) -> str:
        """SHA-256 over the weights, the preprocessing and the levels: what determines every energy."""
        h = hashlib.sha256(json.dumps(self._description(), sort_keys=True).encode())
        for name in sorted(self.tensors):
            h.update(name.encode() + self.tensors[name].tobytes())
        return h.hexdigest()

    @classmethod
    def random(cls, input_dim: int = 64, hidden_dim: int = 256, n_layers: int = 2, n_sigmas: int = 10,
               kind: str = "energy", seed: int = 0, preprocessing: Preprocessing | None = None) -> Bundle:
        """A model with random weights of ordinary size, for tests and benchmarks."""
        a = Architecture(kind, input_dim, hidden_dim, n_layers, n_sigmas)
        rng = np.random.default_rng(seed)
        tensors = {name: (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)
                   for name, shape in a.shapes().items()}
        schema = Schema("random", tuple(f"x{j}" for j in range(input_dim)), ("",) * input_dim)
        sigmas = tuple(np.geomspace(2, 0.05, n_sigmas)) if n_sigmas > 1 else (0.25,)
        default_level = 0 if kind == "autoencoder" else n_sigmas // 2
        return cls(a, tensors, sigmas, default_level, schema,
                   preprocessing or Preprocessing.identity(input_dim))

    def save(self, path: str | Path) -> None:
        """Write the bundle to directory `path`, replacing one that is there; whole or not at all."""
        from safetensors.numpy import save

        check_destination(path)
        path = Path(path).resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        weights = save(dict(sorted(self.tensors.items())))
        description = {"format": FORMAT, "format_version": FORMAT_VERSION,
                       "weights_sha256": hashlib.sha256(weights).hexdigest(), **self._description(),
                       "threshold": self.threshold and asdict(self.threshold), "provenance": self.provenance,
                       "reports": self.reports, "level_mean": self.level_mean, "level_std": self.level_std,
                       "quantiles": self.quantiles,
                       "class_thresholds": self.class_thresholds and asdict(self.class_thresholds)}
        text = json.dumps(description, indent=1, allow_nan=False) + "\n"
        new = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            new.chmod(0o755)
            for name, content in (("model.safetensors", weights), ("model.json", text.encode())):
                with open(new / name, "wb") as f:
                    f.write(content)
                    f.flush()
                    os.fsync(f.fileno())
            if path.exists():
                _exchange(new, path)
            else:
                os.rename(new, path)
            directory = os.open(path.parent, os.O_RDONLY)
            os.fsync(directory)
            os.close(directory)
        finally:  # after an exchange this is the bundle that was replaced
            shutil.rmtree(new, ignore_errors=True)

    @classmethod
    def load(cls, path: str | Path) -> Bundle:
        """Read a bundle directory; DataError names the file and what is wrong with it."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        path = Path(path)
        if not path.is_dir():
            raise DataError(f"{path}: {'a file, expected a' if path.exists() else 'no such'} model directory")
        json_path, weights_path = path / "model.json", path / "model.safetensors"
        content = {}
        for p in (json_path, weights_path):
            try:
                content[p] = p.read_bytes()
            except OSError as e:
                raise DataError(f"{p}: cannot be read ({e.strerror}); a bundle has model.json and "
                                "model.safetensors") from None
        try:
            d = json.loads(content[json_path])
        except ValueError as e:
            raise DataError(f"{json_path}: not valid JSON ({e})") from None
        if not isinstance(d, dict) or d.get("format") != FORMAT:
            raise DataError(f"{json_path}: not the description of a {FORMAT}")
        if d.get("format_version") != FORMAT_VERSION:
            raise DataError(f"{json_path}: format version {d.get('format_version')!r}, this version reads "
                            f"{FORMAT_VERSION}")
        given = hashlib.sha256(content[weights_path]).hexdigest()
        if given != d.get("weights_sha256"):
            raise DataError(f"{weights_path}: truncated, damaged or from another model (SHA-256 {given[:12]}, "
                            f"model.json says {str(d.get('weights_sha256'))[:12]})")
        try:
            features = d["features"]
            schema = Schema(d["schema"], tuple(f["name"] for f in features), tuple(f["unit"] for f in features),
                            d["missing_marker"], tuple(f["impute"] is not None for f in features))
            columns = {k: [np.nan if f[k] is None else f[k] for f in features]
                       for k in ("marker", "impute", "scale", "mean", "inv_std")}
            preprocessing = Preprocessing(transform=[TRANSFORMS.index(f["transform"]) for f in features], **columns)
            threshold = d["threshold"] and Threshold(**d["threshold"])
            by = d.get("class_thresholds")
            by = by and ClassThresholds(by["feature"], tuple(by["lowest"]),
                                        tuple(Threshold(**t) for t in by["thresholds"]))
            return cls(Architecture(**d["architecture"]), load(content[weights_path]), tuple(d["sigmas"]),
                       d["default_level"], schema, preprocessing, threshold, d["provenance"], d.get("reports", {}), by,
                       tuple(d.get("level_mean", ())), tuple(d.get("level_std", ())),
                       tuple(tuple(pair) for pair in d.get("quantiles", ())))
        except KeyError as e:
            raise DataError(f"{json_path}: entry {e} is missing") from None
        except DataError as e:
            raise DataError(f"{path}: {e}") from None
        except (TypeError, ValueError, SafetensorError) as e:
            raise DataError(f"{path}: damaged ({e})") from None

    def _description(self) -> dict:
        p = self.preprocessing
        columns = zip(self.schema.features, self.schema.units, p.marker, p.impute, p.transform, p.scale, p.mean,
                      p.inv_std, strict=True)
        return {
            "architecture": asdict(self.architecture), "sigmas": [float(s) for s in self.sigmas],
            "default_level": self.default_level, "schema": self.schema.name,
            "missing_marker": self.schema.missing_marker,
            "features": [
                {"name": name, "unit": unit, "marker": _number(marker), "impute": _number(impute),
                 "transform": TRANSFORMS[transform], "scale": _number(scale), "mean": _number(mean),
                 "inv_std": _number(inv_std)}
                for name, unit, marker, impute, transform, scale, mean, inv_std in columns
            ],
        }


def check_destination(path: str | Path) -> None:
    """DataError where `Bundle.save(path)` would refuse or could not write; call it before long work."""
    path = Path(path)
    if path.exists() and not (path / "model.json").is_file() and (not path.is_dir() or any(path.iterdir())):
        raise DataError(f"{path} exists and is no model bundle: it is not overwritten")
    parent = path.resolve().parent
    while not parent.exists():
        parent = parent.parent
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as e:
        raise DataError(f"{path} cannot be written: {parent}: {e.strerror}") from None


def _exchange(new: Path, path: Path) -> None:
    """Swap two directories in one step, so that there is a whole bundle at `path` at any time."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if renameat2 and renameat2(here, os.fsencode(new), here, os.fsencode(path), exchange) == 0:
        return
    # A file system that cannot exchange: two renames, undone where the second fails.
    old = new.with_name(new.name + ".old")
    os.rename(path, old)
    try:
        os.rename(new, path)
    except OSError:
        os.rename(old, path)
        raise
    os.rename(old, new)


def _number(value: np.float32) -> float | None:
    return None if np.isnan(value) else float(value)
