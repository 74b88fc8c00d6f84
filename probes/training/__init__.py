"""Shared by stochastic fits: minibatches, softmax losses, threads, checkpoints."""
