"""Speed, memory and agreement beside other implementations. `python -m bench.meta_gradient --help` says how."""
