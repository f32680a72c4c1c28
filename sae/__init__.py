"""k-sparse autoencoders: the maths, the training step, the metrics. Nothing here knows llama.cpp or GGUF."""
