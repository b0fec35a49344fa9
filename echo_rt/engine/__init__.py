"""One video on one device: the rollout and its state, how its work reaches the device, what is built for it."""
