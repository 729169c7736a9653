"""`python -m petractl` is `petractl`."""

from petractl.cli.app import main

main()
