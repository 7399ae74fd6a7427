"""Evaluators; run from the checkout."""
