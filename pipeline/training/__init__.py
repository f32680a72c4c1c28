"""What `ggscope train` does around the trainer of `sae`: settings, learning-rate search, logs, pictures."""
