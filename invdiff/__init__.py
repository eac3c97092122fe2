"""invdiff: medical and scientific scans from few measurements, with pretrained 2D diffusion priors."""

from pathlib import Path as _Path

# Only in a source checkout: operators, datasets and pipelines stand beside this folder, not inside it.
_root = _Path(__file__).resolve().parent.parent
if not (_Path(__file__).parent / "operators").is_dir() and (_root / "operators" / "__init__.py").is_file():
    __path__.append(str(_root))

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """``reconstruct``, ``sample``, ``Result`` and ``measured_or_invented``, imported when first asked for."""
    if name == "measured_or_invented":
        from invdiff.invented import measured_or_invented

        return measured_or_invented
    if name in ("reconstruct", "sample", "Result"):
        from invdiff import reconstruction

        return getattr(reconstruction, name)
    raise AttributeError(f"module 'invdiff' has no attribute {name!r}")
