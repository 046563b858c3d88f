"""The command line `fastmaml`: every command parses, calls and prints; the work is done elsewhere."""
