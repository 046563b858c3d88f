"""The command line `fastmaml`. Each command parses its arguments, calls the library and prints the result."""
