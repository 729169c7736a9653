"""petractl: train deep nets by PETRA and its relatives, decoupled and reversible."""

__version__ = "0.1.0"
