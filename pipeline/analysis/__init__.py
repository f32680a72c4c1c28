"""What the latents do: their contexts, the tokens they promote, what steering by them changes."""
