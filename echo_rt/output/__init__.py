"""What a stream can be written to: a video, its latents, a contact sheet."""
