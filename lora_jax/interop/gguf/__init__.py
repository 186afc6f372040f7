"""GGUF files, written: a merged model, and an adapter alone."""

from . import lora as lora
from . import model as model
