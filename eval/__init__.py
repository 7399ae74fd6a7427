"""Evaluators, one folder each, on the shared frame of eval/harness.py.

They run from the checkout.
"""
