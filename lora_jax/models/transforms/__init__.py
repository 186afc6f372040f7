"""Base transforms: what is done to a base between its load and its fingerprint, one file a transform."""

from __future__ import annotations

from ...config.doors import TRANSFORMS

register_transform = TRANSFORMS.register
