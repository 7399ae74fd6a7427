"""Class-conditional metrics: FID, sFID, Inception score, precision and recall.

See score.py.
"""
