"""Turns a Stable Diffusion checkpoint into a bundle: ONNX, engines, and proof that they match."""

from sd_export.build import build
from sd_export.export import ExportReport, export

__all__ = ["ExportReport", "build", "export"]
