"""One file per command: parse, open the inputs, call, write, keep the manifest."""
