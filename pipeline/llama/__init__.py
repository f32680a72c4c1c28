"""llama.cpp as an instrument: the only folder that imports llama_cpp (identity.py and hooks.py do not)."""
