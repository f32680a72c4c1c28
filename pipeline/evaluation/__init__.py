"""How good an SAE is: reconstruction, and what the model loses when it runs on the reconstruction."""
