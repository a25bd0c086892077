"""rftjax: reinforcement fine-tuning of language models in JAX."""
