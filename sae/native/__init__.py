"""The training step in C, built with the machine's compiler when it is first wanted; torch stays the reference."""
