"""FFSSL: self-supervised pre-training of image encoders at less than half the cost."""

__version__ = "0.2.0"
