"""`python -m jaxfusion` is the command `jaxfusion`."""

from jaxfusion.commands.main import main

main()
