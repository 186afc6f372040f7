"""PEFT's adapter files, read and written."""

from . import save as save
