"""Timings beside other implementations; run from a checkout."""
