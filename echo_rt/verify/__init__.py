"""Comparison of golden bundles and decoders with what they must compute."""
