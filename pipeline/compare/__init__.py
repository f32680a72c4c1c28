"""What `ggscope compare` shows: the SAEs of several train runs beside each other."""
