"""Model weights in and out: Hugging Face directories, GGUF files, adapters."""
