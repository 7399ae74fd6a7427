"""Embedded worlds: pictures that are drawn and scored exactly, without downloads."""
