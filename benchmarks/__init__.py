"""Timings compared with other implementations; run from a checkout."""
