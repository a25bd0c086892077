"""Ready-made rewards, one module each: set `evaluator="rftjax.evaluators.NAME:evaluate"`.

They import the standard library and `rftjax.types` only, for they run in worker processes without
JAX. A task that lacks what its evaluator needs raises ValueError: a fault in the data is never a
reward of 0.
"""
