"""Evaluators in the forms that people already have, one module a form, and `load`, which finds out which one it is.

Worker processes import this package: standard library and records only. What a form's own package is needed for is
imported by its module when such an evaluator is loaded.
"""
