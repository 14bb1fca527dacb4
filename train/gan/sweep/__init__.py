"""Many runs by one command: which they are, where they stand, what they gave."""
