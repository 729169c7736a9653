"""What a stage does in forward and backward, and what it keeps in between."""
