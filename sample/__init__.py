"""The sample model and sample text: a small trained language model that ships with the package."""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "sample-neox"
TEXT_PATH = Path(__file__).parent / "heldout.jsonl"

__all__ = ["MODEL_DIR", "TEXT_PATH"]
