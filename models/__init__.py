"""Models that ggscope trains for itself (development only, not part of the wheel)."""
