"""The nnunet-ssl command, one file per subcommand."""
