"""What every part stands on: devices, files, processes, wording."""
