"""What a run survives: signals and time limits, bad steps, ranks that die."""
