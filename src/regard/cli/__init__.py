"""The `regard` command: one file per subcommand, put together in `main`."""
