"""echo-rt: endless, real-time video from Wan2.1 with evolving memory."""
