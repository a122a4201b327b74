"""Malformed inputs made of valid ones, and what falign does with them; see ``scripts/fuzz_inputs.py``."""
