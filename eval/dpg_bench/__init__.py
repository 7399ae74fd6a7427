"""DPG-Bench: dense prompts, judged by questions to a vision-language model.

See score.py.
"""
