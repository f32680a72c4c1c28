"""Ways of looking at one forward pass: logit lens, attention maps, head ablation, activation patching."""
