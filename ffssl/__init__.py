"""FFSSL: self-supervised pre-training of image encoders at less than half the cost."""

__version__ = "0.1.0"
