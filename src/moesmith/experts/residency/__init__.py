"""Where experts lie and how they get to the device that computes with them."""
