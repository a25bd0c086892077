"""Reads and writes weights: Hugging Face directories, GGUF files (read only), adapters."""
