"""Floor 2: what holds packed experts and computes with them, and the three places where it plugs in."""
