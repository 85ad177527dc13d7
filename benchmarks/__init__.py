"""Training programs in ordinary PyTorch, and what measures Twofold on them."""
