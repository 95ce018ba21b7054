"""Pre-train graph foundation models for atoms on many inconsistent sources of quantum-mechanical data at once."""

__version__ = "0.1.0"
