"""Changes of the forward pass at a hook point, applied as x + delta."""
