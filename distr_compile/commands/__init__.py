"""The subcommands of ``distr``, a module each: ``add`` makes its parser, ``run`` does the work."""
