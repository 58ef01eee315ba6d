"""`python -m thinwire`: the command line of the interpreter that runs it, as job scripts start it."""

from thinwire.cli import main

main()
