"""In and out: PEFT adapters and Hugging Face checkpoints."""
