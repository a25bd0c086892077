"""Ready-made rewards, one module each: set `evaluator="rftjax.evaluators.NAME:evaluate"`.

They run in worker processes and import only the standard library, `rftjax.types` and `rftjax.sandbox`. A task without
the fields that its evaluator needs raises ValueError: a fault in the data never becomes a reward of 0.
"""
