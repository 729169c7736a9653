"""What a model costs and how to cut it into stages."""
