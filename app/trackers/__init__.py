"""Tracking services beside metrics.jsonl and TensorBoard: one file each, imported only where a recipe asks for it."""
