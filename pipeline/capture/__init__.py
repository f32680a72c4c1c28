"""Capture: batches through llama.cpp, calibration, and the shards they become."""
