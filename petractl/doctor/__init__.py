"""What a machine must have for training, looked at one thing at a time: `petractl doctor`."""
