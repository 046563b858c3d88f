"""Speed, memory and agreement beside other implementations. `python -m bench.run --help` says how."""
