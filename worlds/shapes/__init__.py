"""The world `shapes`: draw.py draws pictures, detect.py finds shapes in them,
prompts.py evaluates.
"""
