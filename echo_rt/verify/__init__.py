"""Golden bundles and decoders held against what they must compute."""
