"""Sweeps: one recipe trained with every combination of some values, each in a process of its own."""
