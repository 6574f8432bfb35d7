"""The subcommands of `embedft`, each a thin layer over a function of the library."""
