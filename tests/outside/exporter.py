"""An exporter: the trained arrays of a member as one NumPy archive."""

import numpy as np

from lora_jax import register_exporter
from lora_jax.adapters.partition import partition
from lora_jax.interop.export import Exporter


class Npz(Exporter):
    summary = "The trained arrays as a NumPy archive."

    def write(self, restored, folder, options):
        np.savez(folder / "adapter.npz", **{name: np.asarray(a) for name, a in partition(restored.model).trainable.items()})


register_exporter("outside-npz", Npz())
