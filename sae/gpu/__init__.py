"""The sparse part of the training step in Triton, for GPUs; torch stays the reference."""
