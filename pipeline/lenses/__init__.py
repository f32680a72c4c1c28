"""Ways of looking at one forward pass: logit lens, activation patching."""
