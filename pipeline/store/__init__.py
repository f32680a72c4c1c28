"""The activation store: a zarr v3 group whose shards are also plain row-major files."""
