"""Settings of TRL, LLaMA-Factory and axolotl: one table for messages about run files and for ``falign import``."""
