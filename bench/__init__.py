"""Speed, memory and agreement against other implementations. Start with `python -m bench.meta_gradient --help`."""
