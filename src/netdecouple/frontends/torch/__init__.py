"""PyTorch modules: find convolutions by running, stream activations into moments, put stages back."""
