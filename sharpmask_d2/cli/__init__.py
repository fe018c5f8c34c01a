"""The subcommands of the console command `sharpmask`, one module each; `sharpmask_command.py` beside this package starts them."""
