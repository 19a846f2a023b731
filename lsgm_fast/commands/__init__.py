"""The subcommands of ``lsgm-fast``, one module per kind; ``lsgm_fast/cli.py`` puts them together."""
