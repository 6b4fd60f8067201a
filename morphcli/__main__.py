"""`python -m morphserve.morphcli` is `morph`."""

from morphserve.morphcli.app import main

main()
