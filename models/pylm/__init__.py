"""pylm: the small Python-source language model that ggscope's demo runs on."""
