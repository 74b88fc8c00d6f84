"""Softmax regression from a residual stream to the token N further on."""
